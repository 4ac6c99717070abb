"""Checks of what a user gives as ``--options.KEY VALUE``."""

from __future__ import annotations

from typing import Any

from dhf.errors import UsageError

__all__ = ["require_finite", "require_whole"]


def require_whole(least: int, **options: Any) -> None:
    """Raise UsageError unless every option, given by its name, is a whole number of at least ``least``."""
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(
                f"{name} must be a whole number and at least {least}, got {value!r}; set it by --options.{name}"
            )


def require_finite(least: float, **options: Any) -> None:
    """Raise UsageError unless every option, given by its name, is a finite number of at least ``least``."""
    for name, value in options.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not least <= value < float("inf"):
            raise UsageError(
                f"{name} must be a finite number and at least {least:g}, got {value!r}; set it by --options.{name}"
            )
