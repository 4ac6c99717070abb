"""Which steps' solves are recorded: ``auto``, ``all``, ``none``, or steps by number. Imports no torch."""

from __future__ import annotations

from dhf.errors import UsageError

__all__ = ["check_chosen", "is_chosen"]

_WORDS = ("auto", "all", "none")


def check_chosen(chosen: str) -> None:
    """Raise UsageError unless this names steps."""
    if chosen not in _WORDS and not all(part.strip().isdecimal() and int(part) for part in chosen.split(",")):
        raise UsageError(f"--record-solves {chosen} is unknown; give auto, all, none, or steps such as 1,5,10")


def is_chosen(chosen: str, step: int, first_step: int = 0) -> bool:
    """Whether the solve of a step is recorded.

    Args:
        chosen: Which are; auto takes the steps 1, 2, 5, 10, 20, 50, ... of each phase, so that long runs stay small.
        step: Counted through the run.
        first_step: Steps that were done when the phase began.
    """
    if chosen in _WORDS:
        return chosen == "all" or (chosen == "auto" and str(step - first_step).rstrip("0") in ("1", "2", "5"))
    return step in (int(part) for part in chosen.split(","))
