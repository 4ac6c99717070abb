"""Stochastic estimators of what a symmetric operator is as a whole: its trace, diagonal and spectral density."""

from dhf.estimators.spectral_density import SpectralDensity, spectral_density
from dhf.estimators.trace_and_diagonal import DiagonalEstimate, TraceEstimate, diagonal, trace

__all__ = [
    "DiagonalEstimate",
    "SpectralDensity",
    "TraceEstimate",
    "diagonal",
    "spectral_density",
    "trace",
]
