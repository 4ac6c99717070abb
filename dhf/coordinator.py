"""Coordinator: status in, verdict out. Every rank tells what it saw; all ranks act on the same answer.

A status word of a few integers rides at the end of a product's buffer, so that agreement costs no collective of its
own. Each rank adds its counts, and rank 0 alone adds its decision; the all-reduce hands every rank the same sums.

    [ Σ proposal, Σ proposal², proposal of rank 0, failed, non-finite, interrupted, out of time, moved, diverged ]

A proposal is the Reason for which this rank's solver wants to end, 0 to go on. If all ranks proposed the same
(Σ (proposal - leader)² = 0, exact in float32 for 60,000 ranks), the product is good: they multiplied the same
vector. If not (inner products that rounded differently on two ranks at the very threshold), the product is a mixture of two
vectors; then all ranks follow rank 0 and multiply again. So a solve ends at one iteration everywhere, and an extra
product is paid only when ranks really disagree.
"""

from __future__ import annotations

import dataclasses
import math
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dhf.comm import Communicator
from dhf.errors import RankError, ReplicasDivergedError, StaleGraphError, UsageError
from dhf.reason import Reason

__all__ = ["Coordinator", "Verdict", "capture"]

T = TypeVar("T")

_SUM, _SQUARES, _LEADER, _FAILED, _NON_FINITE, _INTERRUPTED, _LATE, _MOVED, _DIVERGED = range(9)


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What all ranks agreed.

    Attributes:
        reason: Why the solve ends, or None to go on.
        valid: Whether the summed product belongs to one and the same vector on all ranks.
    """

    reason: Reason | None
    valid: bool


class Coordinator:
    """Turns what single ranks see into decisions that all ranks share.

    Args:
        comm: The communicator.
        interrupted: Says whether this rank has received a stop signal.
        deadline: ``time.monotonic()`` second at which rank 0 ends the work; None for never.

    Attributes:
        WIDTH: Numbers in a status word.
        stopping: Reason.INTERRUPTED or Reason.TIME_LIMIT once all ranks know of it, else None.
        non_finite_ranks: The ranks that put NaN or infinity into the last non-finite product.
    """

    WIDTH = 9

    def __init__(
        self,
        comm: Communicator,
        *,
        interrupted: Callable[[], bool] = lambda: False,
        deadline: float | None = None,
    ) -> None:
        self.comm = comm
        self.deadline = deadline
        self.stopping: Reason | None = None
        self.non_finite_ranks: list[int] = []
        self._interrupted = interrupted
        self._failure: BaseException | None = None
        self._finite: Tensor | None = None
        self._fingerprint: list[float] = []
        self._diverged = False

    def fill(
        self,
        word: Tensor,
        *,
        proposal: Reason | None = None,
        failure: BaseException | None = None,
        finite: Tensor | None = None,
        moved: Tensor | None = None,
    ) -> None:
        """Write this rank's status into the last ``WIDTH`` entries of a buffer that is about to be summed.

        Args:
            word: The entries, shape (WIDTH,), of the buffer's dtype and device.
            proposal: Why this rank wants to end, or None to go on.
            failure: What went wrong here, if anything did.
            finite: 0-dim tensor, finite if this rank's contribution is; read on the device, without waiting for it.
            moved: 0-dim tensor, non-zero if this rank's parameters moved under its graph.
        """
        self._failure, self._finite = failure, finite
        code = float(proposal or 0)
        leads = self.comm.rank == 0
        late = leads and self.deadline is not None and time.monotonic() >= self.deadline
        on_cpu = word.device.type == "cpu"
        broken = on_cpu and finite is not None and not math.isfinite(finite.item())
        known = (
            code,
            code * code,
            code * leads,
            failure is not None,
            broken,
            self._interrupted(),
            late,
            0,
            self._diverged,
        )
        if on_cpu:
            word.numpy()[:] = known
        else:
            word.copy_(torch.tensor([float(k) for k in known], dtype=word.dtype))
            if finite is not None:  # written on the device, which is not waited for
                word[_NON_FINITE] = (~torch.isfinite(finite)).to(word.dtype)
        if moved is not None:
            word[_MOVED] = moved.to(word.dtype)

    def read(self, word: Tensor) -> Verdict:
        """The verdict in a status word that has been summed.

        Raises:
            UsageError, StaleGraphError, RankError: If a rank failed; the same on every rank, naming the first that failed.
            ReplicasDivergedError: If a rank's parameters were not those of rank 0.
        """
        total = word.tolist()
        if total[_FAILED]:
            self._raise_failure()
        if total[_DIVERGED]:
            self._raise_diverged()
        if total[_MOVED]:
            raise StaleGraphError(
                "parameters changed on at least one rank after the graph was built; leave the operator before moving them"
            )
        leader = Reason(int(total[_LEADER])) if total[_LEADER] else None
        code = float(leader or 0)
        agreed = total[_SQUARES] - 2 * code * total[_SUM] + self.comm.size * code * code == 0
        if total[_NON_FINITE]:
            mine = self._finite is not None and not bool(torch.isfinite(self._finite))
            self.non_finite_ranks = [r for r, bad in enumerate(self.comm.gather_objects(mine)) if bad]
            return Verdict(Reason.NON_FINITE, agreed)
        self._note_stop(total[_INTERRUPTED], total[_LATE])
        return Verdict(leader if leader is not None or not agreed else self.stopping, agreed)

    def reduce(self, values: Sequence[float], *, failure: BaseException | None = None) -> list[float]:
        """Sum a few float64 numbers over the ranks, with the status riding along; identical on every rank.

        Raises:
            UsageError, RankError, ReplicasDivergedError: As :meth:`read`.
        """
        buffer = torch.zeros(len(values) + self.WIDTH, dtype=torch.float64)
        if failure is None:
            buffer[: len(values)] = torch.tensor(list(values), dtype=torch.float64)
        self.fill(buffer[len(values) :], failure=failure)
        self.comm.all_reduce(buffer)
        self.read(buffer[len(values) :])
        return buffer[: len(values)].tolist()

    def attempt(self, function: Callable[[], T]) -> T:
        """Call ``function`` on this rank; if it fails on any rank, raise the same error on every rank."""
        value, failure = capture(function)
        self.reduce([], failure=failure)
        return value  # type: ignore[return-value]

    def expect_replicas(self, vector: Tensor) -> list[float]:
        """Rank 0's fingerprint of a vector, for a :meth:`reduce`; the other ranks contribute zeros."""
        self._fingerprint = _fingerprint(vector)
        return self._fingerprint if self.comm.rank == 0 else [0.0] * len(self._fingerprint)

    def compare_replicas(self, reduced: Sequence[float]) -> None:
        """Compare this rank's vector with rank 0's; a difference is reported in the next status word, to all ranks."""
        self._diverged = list(reduced) != self._fingerprint

    def synchronise(self, vector: Tensor, numbers: Sequence[float]) -> tuple[list[float], float]:
        """Give every rank rank 0's bits of a vector and of a few numbers that were computed alike on all.

        Two collectives of a few numbers when they agree, as they do on like hardware; a broadcast more when not.

        Returns:
            Rank 0's numbers, and the largest relative distance of a rank's vector from rank 0's (0.0 if none differs).
        """
        mark = self.expect_replicas(vector)
        leads = self.comm.rank == 0
        reduced = self.reduce([*mark, *(n if leads else 0.0 for n in numbers)])
        differs = reduced[: len(mark)] != self._fingerprint
        distance = 0.0
        if self.reduce([float(differs)])[0]:
            mine = vector.clone()
            self.comm.broadcast(vector)
            scale = float(torch.linalg.vector_norm(vector)) or 1.0
            apart = float(torch.linalg.vector_norm(mine - vector)) / scale
            distance = max(self.comm.gather_objects(apart))
        return reduced[len(mark) :], distance

    def _note_stop(self, interrupted: float, late: float) -> None:
        if interrupted:
            self.stopping = Reason.INTERRUPTED
        elif late and self.stopping is None:
            self.stopping = Reason.TIME_LIMIT

    def _raise_failure(self) -> None:
        reports = self.comm.gather_objects(_report(self._failure))
        rank, (host, own, message, trace) = next((r, report) for r, report in enumerate(reports) if report)
        if own is not None:
            raise own(message if self.comm.size == 1 else f"rank {rank}: {message}") from self._failure
        if self.comm.size == 1 and self._failure is not None:
            raise self._failure
        raise RankError(rank, host, message, trace) from self._failure

    def _raise_diverged(self) -> None:
        wrong = [r for r, bad in enumerate(self.comm.gather_objects(self._diverged)) if bad]
        self._diverged = False
        raise ReplicasDivergedError(
            f"the parameters of rank {', '.join(map(str, wrong))} differ from those of rank 0; give all ranks the same seed "
            "and the same initial weights, and move parameters only through the optimizer"
        )


def capture(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The function's value, or what it raised: a rank that fails must still join the next collective."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def _report(failure: BaseException | None) -> tuple[str, type[Exception] | None, str, str] | None:
    if failure is None:
        return None
    trace = "".join(traceback.format_exception(failure))
    own = next((kind for kind in (UsageError, StaleGraphError) if isinstance(failure, kind)), None)
    words = str(failure).strip() or type(failure).__name__
    return socket.gethostname(), own, words if own else f"{type(failure).__name__}: {words}", trace


def _fingerprint(vector: Tensor) -> list[float]:
    """64 bits of a vector's bits, as four integers that float64 holds exactly."""
    bits = vector.detach().contiguous().view(torch.int64 if vector.element_size() == 8 else torch.int32).long()
    weights = torch.arange(1, bits.numel() + 1, device=bits.device) * 0x9E3779B1
    total = int((bits * weights).sum()) & 0xFFFFFFFFFFFFFFFF  # wraps modulo 2^64, the same on every device
    return [float(total >> shift & 0xFFFF) for shift in (0, 16, 32, 48)]
