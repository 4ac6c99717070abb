"""The errors dhf raises: one sentence each, saying what was found, where, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "CommunicationError",
    "NonFiniteError",
    "PerSampleError",
    "RankError",
    "RanksDifferError",
    "ReplicasDivergedError",
    "StaleGraphError",
    "UsageError",
]


class UsageError(ValueError):
    """Something the user gave (a flag, a file, a module, data) cannot be used; the text says what to do."""


class PerSampleError(UsageError):
    """An objective cannot be differentiated sample by sample: samples depend on one another, or vmap cannot enter its code."""


class StaleGraphError(RuntimeError):
    """A product was asked of a graph whose parameters have changed since it was built."""


class NonFiniteError(ArithmeticError):
    """A loss, gradient or product holds NaN or infinity; the text names the ranks.

    Attributes:
        places: The ranks, each with the sample that ``debug_nonfinite`` has found, or None.
    """

    def __init__(self, message: str, places: Mapping[int, Any] | None = None) -> None:
        super().__init__(message)
        self.places: Mapping[int, Any] = places or {}


class RanksDifferError(UsageError):
    """Two ranks were given different settings, data, models or versions, found before anything was computed with them.

    Attributes:
        rank: The first rank that differs from rank 0.
    """

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank

    def __reduce__(self) -> tuple:
        return type(self), (self.rank, str(self))


class CommunicationError(RuntimeError):
    """The ranks cannot reach one another any more; the communicator is unusable.

    Attributes:
        missing: The ranks that did not answer a roll-call after the failure; empty where nobody could be asked.
        survivors: The ranks that did, this one included.
    """

    def __init__(self, message: str, missing: tuple[int, ...] = (), survivors: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.missing, self.survivors = missing, survivors

    @property
    def rank(self) -> int | None:
        """The first missing rank, or None."""
        return self.missing[0] if self.missing else None


class ReplicasDivergedError(RuntimeError):
    """The ranks hold different parameters where they must hold the same bits.

    Attributes:
        rank: The first rank that differs from rank 0, or None where that is not known.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class RankError(RuntimeError):
    """Code failed on one rank; every rank raises this with the failing rank's own words.

    Attributes:
        rank: The first rank that failed.
        host: Its host name.
        traceback: The failing rank's traceback as text.
        micro_batch: The index of the micro-batch it failed in, within its shard; None outside of one.
        out_of_memory: Whether all that failed anywhere is that memory ran out in a micro-batch.
    """

    def __init__(
        self,
        rank: int,
        host: str,
        message: str,
        traceback: str = "",
        micro_batch: int | None = None,
        out_of_memory: bool = False,
    ) -> None:
        where = "" if micro_batch is None else f" in its micro-batch {micro_batch}"
        super().__init__(f"rank {rank} ({host}) failed{where}: {message}")
        self.rank, self.host, self.traceback, self.micro_batch = rank, host, traceback, micro_batch
        self.out_of_memory, self._message = out_of_memory, message

    def __reduce__(self) -> tuple:
        parts = (self.rank, self.host, self._message, self.traceback, self.micro_batch, self.out_of_memory)
        return type(self), parts
