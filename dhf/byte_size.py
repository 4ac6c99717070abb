"""Numbers of bytes as people write them. Imports no torch."""

from __future__ import annotations

import math
import re

__all__ = ["bytes_in_words", "parse_bytes"]

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}


def parse_bytes(text: str) -> int | None:
    """The bytes of a size such as ``2GiB``, ``500MB`` or ``1e9``; None for what is none.

    Example:
        >>> parse_bytes("2GiB"), parse_bytes("500 MB"), parse_bytes("some")
        (2147483648, 500000000, None)
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[+]?[0-9]+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    if found is None or found[2].upper() not in _UNITS:
        return None
    try:
        size = float(found[1]) * _UNITS[found[2].upper()]
    except ValueError:
        return None
    return int(size) if math.isfinite(size) else None


def bytes_in_words(size: float) -> str:
    """A size with three digits or so.

    Example:
        >>> bytes_in_words(123456789), bytes_in_words(3 * 2**30)
        ('117.7 MiB', '3.0 GiB')
    """
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
