"""How a run ends: the reason of an error, the exit code of a reason, and what is said of a failure."""

from __future__ import annotations

import sys
import traceback

from dhf.errors import (
    CommunicationError,
    NonFiniteError,
    RankError,
    ReplicasDivergedError,
    StaleGraphError,
    UsageError,
)
from dhf.reason import Reason

__all__ = [
    "EXIT_DONE",
    "EXIT_RANKS",
    "EXIT_TARGET",
    "EXIT_USAGE",
    "SHARED",
    "exit_code",
    "explain",
    "in_words",
    "reason_of",
    "speaker",
]

EXIT_DONE, EXIT_USAGE, EXIT_DIVERGED, EXIT_TARGET, EXIT_RANKS, EXIT_SIGNAL = 0, 2, 3, 4, 5, 75

# errors that every rank raises together, so that the ranks can still talk
SHARED = (UsageError, NonFiniteError, RankError, ReplicasDivergedError, StaleGraphError)

_CODES = {
    Reason.UNUSABLE_INPUT: EXIT_USAGE,
    Reason.DIVERGED: EXIT_DIVERGED,
    Reason.RANK_FAILED: EXIT_RANKS,
    Reason.COMMUNICATION_FAILED: EXIT_RANKS,
    Reason.NOT_SAVED: EXIT_RANKS,
    Reason.INTERRUPTED: EXIT_SIGNAL,
}


def reason_of(error: Exception, *, at_start: bool) -> Reason:
    """Why a run ends that this error has ended; ``at_start`` says that no step had been taken."""
    if isinstance(error, UsageError):
        return Reason.UNUSABLE_INPUT
    if isinstance(error, (NonFiniteError, FloatingPointError)):
        return Reason.UNUSABLE_INPUT if at_start else Reason.DIVERGED
    return Reason.COMMUNICATION_FAILED if isinstance(error, CommunicationError) else Reason.RANK_FAILED


def exit_code(reason: Reason, *, target_missed: bool = False, job_ends: bool = False) -> int:
    """The process's exit code.

    Args:
        reason: Why the run ended.
        target_missed: Whether a target loss was missed, and that counts as an error.
        job_ends: Whether the time limit was that of a SLURM job, which can be queued again.
    """
    if reason is Reason.TIME_LIMIT and job_ends:
        return EXIT_SIGNAL
    return _CODES.get(reason, EXIT_TARGET if target_missed else EXIT_DONE)


def explain(failure: Exception, *, speaks: bool) -> None:
    """Say on stderr what went wrong: what all ranks know by the one that speaks for them, the rest by each rank."""
    if isinstance(failure, CommunicationError):
        speaks = speaks or not failure.survivors
    elif not isinstance(failure, SHARED):
        traceback.print_exception(failure)
        speaks = True
    if speaks:
        if isinstance(failure, RankError):
            print(failure.traceback.rstrip(), file=sys.stderr)
        print(f"error: {in_words(failure)}", file=sys.stderr, flush=True)


def in_words(failure: Exception) -> str:
    """An error in one line; with its type and micro-batch where it is not one of dhf's own."""
    if isinstance(failure, (*SHARED, CommunicationError)):
        return str(failure)
    micro_batch = getattr(failure, "micro_batch", None)
    where = "" if micro_batch is None else f"in micro-batch {micro_batch}: "
    return f"{where}{type(failure).__name__}: {failure}"


def speaker(failure: Exception | None) -> int:
    """The rank that speaks for all: the first, or the first of those left."""
    survivors = failure.survivors if isinstance(failure, CommunicationError) else ()
    return survivors[0] if survivors else 0
