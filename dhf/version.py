"""The version of dhf, which must be the same on all ranks."""

__version__ = "0.1.0"
