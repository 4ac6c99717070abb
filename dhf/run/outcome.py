"""How a run ends: the reason of an error, the exit code of a reason, and what is said of a failure."""

from __future__ import annotations

import sys
import traceback

from dhf.errors import CommunicationError, NonFiniteError, RankError, ReplicasDivergedError, UsageError
from dhf.reason import Reason

__all__ = ["EXIT_DONE", "EXIT_RANKS", "EXIT_USAGE", "exit_code", "explain", "reason_of"]

EXIT_DONE, EXIT_USAGE, EXIT_DIVERGED, EXIT_TARGET, EXIT_RANKS, EXIT_SIGNAL = 0, 2, 3, 4, 5, 75

_CODES = {
    Reason.UNUSABLE_INPUT: EXIT_USAGE,
    Reason.DIVERGED: EXIT_DIVERGED,
    Reason.RANK_FAILED: EXIT_RANKS,
    Reason.COMMUNICATION_FAILED: EXIT_RANKS,
    Reason.INTERRUPTED: EXIT_SIGNAL,
}


def reason_of(error: Exception, *, at_start: bool) -> Reason:
    """Why a run ends that this error has ended; ``at_start`` says that no step had been taken."""
    if isinstance(error, UsageError):
        return Reason.UNUSABLE_INPUT
    if isinstance(error, (NonFiniteError, FloatingPointError)):
        return Reason.UNUSABLE_INPUT if at_start else Reason.DIVERGED
    return Reason.COMMUNICATION_FAILED if isinstance(error, CommunicationError) else Reason.RANK_FAILED


def exit_code(reason: Reason, *, target_missed: bool = False) -> int:
    """The process's exit code; ``target_missed`` where missing the target loss counts as an error."""
    return _CODES.get(reason, EXIT_TARGET if target_missed else EXIT_DONE)


def explain(failure: Exception, leads: bool) -> None:
    """Say on stderr what went wrong: what all ranks know by rank 0 alone, what only this rank can know by itself."""
    known = (UsageError, NonFiniteError, RankError, ReplicasDivergedError)
    if isinstance(failure, CommunicationError) or (isinstance(failure, known) and leads):
        if isinstance(failure, RankError):
            print(failure.traceback.rstrip(), file=sys.stderr)
        print(f"error: {failure}", file=sys.stderr, flush=True)
    elif not isinstance(failure, known):
        traceback.print_exception(failure)
