"""Coordinator: status in, verdict out. Every rank tells what it saw; all ranks act on the same answer.

A status word of a few integers rides at the end of a product's buffer, so that agreement costs no collective of its
own. Each rank adds its counts, and rank 0 alone adds its decision; the all-reduce hands every rank the same sums.

    [ Σ proposal, Σ proposal², proposal of rank 0, failed, non-finite, interrupted, out of time, moved ]

A proposal is the Reason for which this rank's solver wants to end, 0 to go on. If all ranks proposed the same
(Σ (proposal - leader)² = 0, exact in float32 for 60,000 ranks), the product is good: they multiplied the same
vector. If not (inner products that rounded differently on two ranks at the very threshold), the product is a mixture of two
vectors; then all ranks follow rank 0 and multiply again. So a solve ends at one iteration everywhere, and an extra
product is paid only when ranks really disagree.

What must be the same on all ranks (parameters, settings, data) travels as a mark, a hash of 64 bits, in the same three sums;
so all ranks learn together whether all agree, before a collective whose shape depends on it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import socket
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from dhf.comm import Communicator, Pending
from dhf.errors import PerSampleError, RankError, RanksDifferError, ReplicasDivergedError, StaleGraphError, UsageError
from dhf.memory import ran_out_of_memory
from dhf.phases import Phases
from dhf.reason import Reason

__all__ = ["Coordinator", "Verdict", "capture", "fingerprint", "mark_of"]

T = TypeVar("T")

_SUM, _SQUARES, _LEADER, _FAILED, _NON_FINITE, _INTERRUPTED, _LATE, _MOVED = range(8)


_ranks_here: weakref.WeakKeyDictionary[Communicator, int] = weakref.WeakKeyDictionary()


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
        phases: Measures what the time goes into; by default nothing is measured.

    Attributes:
        WIDTH: Numbers in a status word.
        MARK: Numbers in which a mark travels.
        stopping: Reason.INTERRUPTED or Reason.TIME_LIMIT once all ranks know of it, else None.
        seconds_waiting: Time this rank has spent in collectives: waiting for slower ranks, and for the network. On a GPU with
            NCCL, whose collectives are queued, this is the time of handing them over.
        non_finite: The ranks that put NaN or infinity into the last product that held any, each with what its search found.
    """

    WIDTH = 8
    MARK = 12

    def __init__(
        self,
        comm: Communicator,
        *,
        interrupted: Callable[[], bool] = lambda: False,
        deadline: float | None = None,
        phases: Phases | None = None,
    ) -> None:
        self.comm = comm
        self.phases = phases or Phases(active=False)
        self.deadline = deadline
        self.stopping: Reason | None = None
        self.seconds_waiting = 0.0
        self.non_finite: dict[int, Any] = {}
        self._interrupted = interrupted
        self._failure: BaseException | None = None
        self._finite: Tensor | None = None

    def ranks_here(self) -> int:
        """How many ranks share this one's host. Collective, when it is called first for a communicator."""
        if self.comm.size == 1:
            return 1
        if self.comm not in _ranks_here:
            mine = socket.gethostname()
            _ranks_here[self.comm] = self.comm.gather_objects(mine).count(mine)
        return _ranks_here[self.comm]

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
        self.see(word, finite, moved)
        self.tell(word, proposal, failure, finite)

    def see(self, word: Tensor, finite: Tensor | None, moved: Tensor | None) -> None:
        """Write what is seen in tensors into an entry each, and zero into the others; on a GPU without waiting for it."""
        word.zero_()
        if finite is not None and word.device.type != "cpu":
            word[_NON_FINITE] = (~torch.isfinite(finite)).to(word.dtype)
        elif finite is not None and not math.isfinite(finite.item()):
            word[_NON_FINITE] = 1.0
        if moved is not None:
            word[_MOVED] = moved.to(word.dtype)

    def tell(
        self, word: Tensor, proposal: Reason | None, failure: BaseException | None, finite: Tensor | None = None
    ) -> None:
        """Add what the host knows to a word that has been seen to; where that is nothing, a GPU is left alone.

        What was seen may have been seen by a replay, of which the host knows nothing; so ``finite`` is given again, for
        :meth:`read`.
        """
        self._failure, self._finite = failure, finite
        code = float(proposal or 0)
        leads = self.comm.rank == 0
        late = leads and self.deadline is not None and time.monotonic() >= self.deadline
        known = {
            _SUM: code,
            _SQUARES: code * code,
            _LEADER: code * leads,
            _FAILED: float(failure is not None),
            _INTERRUPTED: float(self._interrupted()),
            _LATE: float(late),
        }
        if any(known.values()):
            told = [known.get(i, 0.0) for i in range(self.WIDTH)]
            word.add_(torch.tensor(told, dtype=word.dtype).to(word.device))

    def read(self, word: Tensor | Sequence[float], *, search: Callable[[], Any] | None = None) -> Verdict:
        """The verdict in a status word that has been summed.

        Args:
            word: As :meth:`fill` wrote it, summed; or the numbers in it.
            search: Called where this rank's contribution is not finite; its answer reaches all ranks, in ``non_finite``.

        Raises:
            UsageError, StaleGraphError, RankError: If a rank failed; the same on every rank, naming the first that failed.
        """
        total = word.tolist() if isinstance(word, Tensor) else word
        if total[_FAILED]:
            self._raise_failure()
        if total[_MOVED]:
            raise StaleGraphError(
                "parameters changed on at least one rank after the graph was built; leave the operator before moving them"
            )
        leader = Reason(int(total[_LEADER])) if total[_LEADER] else None
        code = float(leader or 0)
        agreed = total[_SQUARES] - 2 * code * total[_SUM] + self.comm.size * code * code == 0
        if total[_NON_FINITE]:
            mine = self._finite is not None and not bool(torch.isfinite(self._finite))
            found = capture(search)[0] if mine and search is not None else None
            everyone = self.comm.gather_objects((mine, found))
            self.non_finite = {rank: place for rank, (bad, place) in enumerate(everyone) if bad}
            return Verdict(Reason.NON_FINITE, agreed)
        self._note_stop(total[_INTERRUPTED], total[_LATE])
        return Verdict(leader if leader is not None or not agreed else self.stopping, agreed)

    def all_reduce(self, buffer: Tensor) -> None:
        """The communicator's sum, timed."""
        self._timed(lambda: self.comm.all_reduce(buffer), buffer)

    def start_all_reduce(self, buffer: Tensor) -> Pending:
        """The communicator's sum, started; :meth:`wait` times what is left of it."""
        self._note(buffer)
        return self.comm.start_all_reduce(buffer)

    def wait(self, pending: Pending) -> None:
        """Until what was started is done."""
        self._timed(pending.wait)

    def reduce_scatter(self, buffer: Tensor, out: Tensor) -> None:
        """The communicator's, timed."""
        self._timed(lambda: self.comm.reduce_scatter(buffer, out), buffer)

    def all_gather(self, piece: Tensor, out: Tensor) -> None:
        """The communicator's, timed."""
        self._timed(lambda: self.comm.all_gather(piece, out), out)

    def total(
        self,
        function: Callable[[], Tensor | None],
        shape: Sequence[int],
        like: Tensor,
        *,
        failure: BaseException | None = None,
    ) -> Tensor:
        """The sum over ranks of what each one's function returns, with the status riding along; the same bits on every rank.

        Args:
            function: Returns a tensor of ``shape``, or None for zeros; where it fails on a rank, all ranks raise.
            shape: The same on every rank.
            like: Has the dtype and device of the sum.
            failure: What has gone wrong on this rank already; the function is not called then.

        Raises:
            UsageError, RankError: As :meth:`read`.
        """
        size = math.prod(shape)
        buffer = torch.zeros(size + self.WIDTH, dtype=like.dtype, device=like.device)
        if failure is None:
            value, failure = capture(function)
            if value is not None:
                buffer[:size] = value.reshape(-1)
        self.fill(buffer[size:], failure=failure)
        self.all_reduce(buffer)
        self.read(buffer[size:])
        return buffer[:size].view(*shape)

    def reduce(self, values: Sequence[float], *, failure: BaseException | None = None) -> list[float]:
        """Sum a few float64 numbers over the ranks, with the status riding along; identical on every rank.

        Raises:
            UsageError, RankError: As :meth:`read`.
        """
        numbers = torch.tensor(list(values), dtype=torch.float64)
        return self.total(lambda: numbers, numbers.shape, numbers, failure=failure).tolist()

    def attempt(self, function: Callable[[], T]) -> T:
        """Call ``function`` on this rank; if it fails on any rank, raise the same error on every rank."""
        value, failure = capture(function)
        self.reduce([], failure=failure)
        return value  # type: ignore[return-value]

    def mark(self, mark: int) -> list[float]:
        """The numbers by which a mark travels in a :meth:`reduce`, shape (MARK,)."""
        leads = self.comm.rank == 0
        pieces = [float(mark >> shift & 0xFFFF) for shift in (0, 16, 32, 48)]
        return [x for m in pieces for x in (m, m * m, m * leads)]

    def same(self, reduced: Sequence[float]) -> bool:
        """Whether all ranks gave the same mark, from its reduced numbers; the same answer on every rank."""
        sums = zip(reduced[::3], reduced[1::3], reduced[2::3], strict=True)
        return all(square - 2 * m * total + self.comm.size * m * m == 0 for total, square, m in sums)

    def require_same(self, facts: Mapping[str, str], *, failure: BaseException | None = None) -> None:
        """Raise RanksDifferError on every rank unless these facts are the same on all; one small collective if they are.

        Args:
            facts: Name to value, in the order in which a difference is looked for.
            failure: What went wrong on this rank; it is raised on every rank instead.
        """
        if not self.same(self.reduce(self.mark(mark_of(facts)), failure=failure)):
            self.raise_difference(facts)

    def raise_difference(self, facts: Mapping[str, str]) -> None:
        """Raise RanksDifferError naming the first fact and rank that differ from rank 0; return if none does. Collective."""
        everyone: list[Mapping[str, str]] = self.comm.gather_objects(dict(facts))
        for rank, theirs in enumerate(everyone):
            for name in [*everyone[0], *(n for n in theirs if n not in everyone[0])]:
                here, there = everyone[0].get(name, "absent"), theirs.get(name, "absent")
                if here != there:
                    raise RanksDifferError(
                        rank,
                        f"rank {rank} differs from rank 0 in {name}: {there} there, {here} on rank 0; give every rank the same "
                        "code, settings and data",
                    )

    def require_replicas(self, vector: Tensor) -> None:
        """Raise ReplicasDivergedError, or return if every rank holds the bits of rank 0. Collective."""
        marks = self.comm.gather_objects(fingerprint(vector))
        wrong = [r for r, mark in enumerate(marks) if mark != marks[0]]
        if wrong:
            raise ReplicasDivergedError(
                f"the parameters of rank {', '.join(map(str, wrong))} differ from those of rank 0; give all ranks the same seed "
                "and the same initial weights, and move parameters only through the optimizer",
                wrong[0],
            )

    def synchronise(self, vector: Tensor, numbers: Sequence[float]) -> tuple[list[float], float]:
        """Give every rank rank 0's bits of a vector and of a few numbers that were computed alike on all.

        One collective of a few numbers when they agree, as they do on like hardware; a broadcast more when not.

        Returns:
            Rank 0's numbers, and the largest relative distance of a rank's vector from rank 0's (0.0 if none differs).
        """
        leads = self.comm.rank == 0
        reduced = self.reduce([*self.mark(fingerprint(vector)), *(n if leads else 0.0 for n in numbers)])
        distance = 0.0
        if not self.same(reduced[: self.MARK]):
            mine = vector.clone()
            self.comm.broadcast(vector)
            scale = float(torch.linalg.vector_norm(vector)) or 1.0
            apart = float(torch.linalg.vector_norm(mine - vector)) / scale
            distance = max(self.comm.gather_objects(apart))
        return reduced[self.MARK :], distance

    def _timed(self, collective: Callable[[], None], buffer: Tensor | None = None) -> None:
        with self.phases("waiting"):
            began = time.perf_counter()
            collective()
            self.seconds_waiting += time.perf_counter() - began
        if buffer is not None:
            self._note(buffer)

    def _note(self, buffer: Tensor) -> None:
        if self.comm.size > 1:
            self.phases.reduced(buffer.nbytes)

    def _note_stop(self, interrupted: float, late: float) -> None:
        if interrupted:
            self.stopping = Reason.INTERRUPTED
        elif late and self.stopping is None:
            self.stopping = Reason.TIME_LIMIT

    def _raise_failure(self) -> None:
        reports = self.comm.gather_objects(_report(self._failure))
        rank, report = next((r, report) for r, report in enumerate(reports) if report)
        if report.kind is not None:
            raise report.kind(
                report.words if self.comm.size == 1 else f"rank {rank}: {report.words}"
            ) from self._failure
        if self.comm.size == 1 and self._failure is not None:
            raise self._failure
        only_memory = all(report.out_of_memory for report in reports if report)
        raise RankError(
            rank, report.host, report.words, report.trace, report.micro_batch, only_memory
        ) from self._failure


@dataclasses.dataclass(frozen=True, slots=True)
class _Report:
    """What one rank tells of its failure; ``kind`` where the error is one that dhf itself raises for its user."""

    host: str
    kind: type[Exception] | None
    words: str
    trace: str
    micro_batch: int | None
    out_of_memory: bool


def capture(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The function's value, or what it raised: a rank that fails must still join the next collective."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def _report(failure: BaseException | None) -> _Report | None:
    if failure is None:
        return None
    kind = next((k for k in (PerSampleError, UsageError, StaleGraphError) if isinstance(failure, k)), None)
    words = str(failure).strip() or type(failure).__name__
    if kind is None:
        words = f"{type(failure).__name__}: {words}"
    ran_out, micro_batch = ran_out_of_memory(failure), getattr(failure, "micro_batch", None)
    if ran_out:
        words += (
            "; out of memory: use smaller micro-batches, more ranks, a smaller batch, or a smaller curvature fraction"
        )
    trace = "".join(traceback.format_exception(failure))
    return _Report(socket.gethostname(), kind, words, trace, micro_batch, ran_out and micro_batch is not None)


def mark_of(facts: Mapping[str, str]) -> int:
    """A 64-bit hash of names and values."""
    text = "".join(f"{name}\0{value}\0" for name, value in facts.items())
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def fingerprint(vector: Tensor) -> int:
    """A 64-bit hash of a vector's bits."""
    bits = vector.detach().contiguous().view(torch.int64 if vector.element_size() == 8 else torch.int32).long()
    weights = torch.arange(1, bits.numel() + 1, device=bits.device) * 0x9E3779B1
    return int((bits * weights).sum()) & 0xFFFFFFFFFFFFFFFF  # wraps modulo 2^64, the same on every device
