"""The errors dhf raises: one sentence each, saying what was found, where, and what to do."""

from __future__ import annotations

__all__ = [
    "CommunicationError",
    "NonFiniteError",
    "RankError",
    "ReplicasDivergedError",
    "StaleGraphError",
    "UsageError",
]


class UsageError(ValueError):
    """Something the user gave (a flag, a file, a module, data) cannot be used; the text says what to do."""


class StaleGraphError(RuntimeError):
    """A product was asked of a graph whose parameters have changed since it was built."""


class NonFiniteError(ArithmeticError):
    """A loss, gradient or product holds NaN or infinity; the text names the ranks."""


class CommunicationError(RuntimeError):
    """The ranks cannot reach one another any more; the communicator is unusable."""


class ReplicasDivergedError(RuntimeError):
    """The ranks hold different parameters where they must hold the same bits."""


class RankError(RuntimeError):
    """Code failed on one rank; every rank raises this with the failing rank's own words.

    Attributes:
        rank: The first rank that failed.
        host: Its host name.
        traceback: The failing rank's traceback as text.
    """

    def __init__(self, rank: int, host: str, message: str, traceback: str = "") -> None:
        super().__init__(f"rank {rank} ({host}) failed: {message}")
        self.rank = rank
        self.host = host
        self.traceback = traceback

    def __reduce__(self) -> tuple:
        return _rank_error, (type(self), self.rank, self.host, self.traceback, self.args)


def _rank_error(cls: type[RankError], rank: int, host: str, traceback: str, args: tuple) -> RankError:
    error: RankError = RankError.__new__(cls)
    error.args = args
    error.rank, error.host, error.traceback = rank, host, traceback
    return error
