"""A step's metrics as one flat mapping: lists and mappings within become names with dots. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["flat"]


def flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """``{"own_seconds": [1.5, 2.0]}`` gives ``{"own_seconds.0": 1.5, "own_seconds.1": 2.0}``.

    Example:
        >>> flat({"step": 3, "phase_seconds": {"graphs": [1.5, 2.0]}})
        {'step': 3, 'phase_seconds.graphs.0': 1.5, 'phase_seconds.graphs.1': 2.0}
    """
    return dict(_leaves("", row))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}" if name else str(key), inner)
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _leaves(f"{name}.{i}", inner)
    else:
        yield name, value
