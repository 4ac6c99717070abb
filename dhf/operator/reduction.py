"""How what every rank has computed of a product becomes one product, and one verdict.

    Whole     every rank receives all of it: one all-reduce of [ status word | riders | product ]
    Pieces    every rank receives one piece of it: the vector is gathered, the product reduce-scattered, and one small
              all-reduce takes the status word, the riders and the inner products of the pieces

Riders are sums that the operator itself needs with a product. In both, a rank that fails still takes part, and all ranks
learn of it together.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dhf.comm import Pending
from dhf.coordinator import Coordinator, Verdict, capture
from dhf.errors import CommunicationError, RankError
from dhf.parameters import Parameters
from dhf.phases import Phases
from dhf.reason import Reason
from dhf.replay import Replay
from dhf.vector_space import LocalDots, Replicated, VectorSpace

__all__ = ["Pieces", "Reduced", "Reducer", "Reduction", "Replays", "Status", "Steady", "Target", "Whole"]

_ALIGNED = 16  # numbers; what stands before the product keeps its place in cache lines


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """Where a rank writes its share.

    Attributes:
        out: Of the product, shape (n,).
        riders: Of what rides with it, shape (riders,); zero at first.
        ready: To be called with the index of each parameter whose part of ``out`` is final, in any order; None where nobody
            wants to know.
    """

    out: Tensor
    riders: Tensor
    ready: Callable[[int], None] | None = None


Work = Callable[[Tensor | None, Target], Any]
Part = Callable[[Sequence[Tensor], Sequence[Tensor]], Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Steady:
    """Work that launches the same kernels for every vector, as long as graphs are kept; a GPU may replay it.

    Attributes:
        launch: The work. What it waits for, it must not wait for on the device.
        prepare: Called on the host with each vector; raises if there is no going on, and says whether the graphs are kept.
        replays: Where what is recorded of it stays from one vector to the next.
        phases: Measures how long it takes, by a replay, too.
    """

    launch: Work
    prepare: Callable[[Tensor], bool]
    replays: Replays
    phases: Phases

    def __call__(self, v: Tensor | None, target: Target) -> None:
        """Once, without a replay."""
        assert v is not None
        with self.phases("products"):
            self.prepare(v)
            self.launch(v, target)

    def start(self, v: Tensor, target: Target, then: Callable[[], None]) -> None:
        """The work, and what always follows it; with a target that is the same each time."""
        replays = self.replays

        def work() -> None:
            self.launch(v if given is None else given, target)
            then()

        with self.phases("products"):
            given = replays.given(v) if self.prepare(v) and v.device.type == "cuda" else None
            if given is None:
                work()
            else:
                given.copy_(v)
                replays.replay(work)


class Replays:
    """What is recorded of an operator's products, and the vector that is multiplied then."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.forget()

    def forget(self) -> None:
        """Free it, since the graphs are to be freed or others."""
        self.replay, self._given = Replay(self._device), torch.empty(0)

    def given(self, like: Tensor) -> Tensor:
        """The vector's memory."""
        if self._given.shape != like.shape:
            self._given = torch.empty_like(like)
        return self._given


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """What a rank says with a product.

    Attributes:
        proposal: Why its solver wants to end, or None to go on.
        failure: What went wrong since the last product.
        moved: Says on a GPU whether its parameters have moved, as a 0-dim tensor; None where that is known otherwise.
        search: Looks for what is not finite.
    """

    proposal: Reason | None = None
    failure: BaseException | None = None
    moved: Callable[[], Tensor | None] = lambda: None
    search: Callable[[], Any] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Reduced:
    """A product as this rank holds it, valid until the next; the riders' sums, and what was agreed."""

    product: Tensor
    riders: Tensor
    verdict: Verdict


class Reducer(Protocol):
    """One way of adding up products."""

    def reduce(self, work: Work, v: Tensor | None, status: Status, add: Sequence[tuple[Tensor, float]] = ()) -> Reduced:
        """The sum over ranks of what each one's ``work(v, target)`` writes, plus multiples of vectors.

        Args:
            work: Called with the whole vector v, shape (n,); its failure is told to all ranks.
            v: As this rank holds it; None where the work needs none, on all ranks alike, or where this rank does none.
            status: Of this rank.
            add: Vectors as this rank holds them, with their factors; added after the sum.
        """


class Reduction(Reducer, Protocol):
    """One way of storing vectors."""

    space: VectorSpace

    def spread(self, parts: Sequence[Part], owners: Sequence[int], r: Tensor) -> Tensor:
        """A function of whole vectors in parts, each of which writes to its own place in an ``out`` of zeros.

        Args:
            parts: ``part(r, out)``, both as one tensor per parameter.
            owners: The rank of each part, for vectors in pieces; that rank alone calls it.
            r: As this rank holds it.

        Returns:
            What the parts have written, as this rank holds it; a new tensor.
        """


class Whole:
    """Every rank holds all of every vector.

    Where buckets are asked for, the all-reduce is cut at parameters, from the last to the first, and each part starts as soon
    as the product's backward pass has finished with it; all ranks start the same parts in the same order.

    Args:
        coordinator: How ranks agree.
        parameters: Whose vectors these are.
        riders: How many numbers ride along.
        bucket_bytes: Least size of a part; None for one part, started at the end.
    """

    def __init__(
        self, coordinator: Coordinator, parameters: Parameters, riders: int, bucket_bytes: int | None = None
    ) -> None:
        self.space: VectorSpace = Replicated()
        self._coordinator, self._parameters, self._riders = coordinator, parameters, riders
        head = math.ceil((Coordinator.WIDTH + riders) / _ALIGNED) * _ALIGNED
        self._buffer = torch.zeros(head + parameters.numel, dtype=parameters.dtype, device=parameters.device)
        self._head, self._product = self._buffer[:head], self._buffer[head:]
        self._word, self._rider_sums = self._head[: Coordinator.WIDTH], self._head[Coordinator.WIDTH :][:riders]
        least = None if bucket_bytes is None else bucket_bytes // parameters.dtype.itemsize
        self._sender: _Sender = _Buckets(coordinator, self._buffer, head, parameters.sizes, least)

    @property
    def at_once(self) -> bool:
        """Whether a product is sent in one piece, at its end."""
        return self._sender.at_once

    def rounded(self, dtype: torch.dtype) -> Reducer:
        """The same, in the same memory, with products sent in a shorter dtype; status and riders are not."""
        other = copy.copy(self)
        other._sender = _Rounding(self._coordinator, self._head, self._product, dtype)
        return other

    def reduce(self, work: Work, v: Tensor | None, status: Status, add: Sequence[tuple[Tensor, float]] = ()) -> Reduced:
        """See :class:`Reduction`."""
        return self.finish(status, self.start(work, v, status), add)

    def start(self, work: Work, v: Tensor | None, status: Status) -> BaseException | None:
        """Write this rank's share of a product, and what it sees of it, into the buffer; what failed in it."""
        failure, sender, seen = status.failure, self._sender, False
        sender.begin()

        def see() -> None:
            unbroken = failure is None
            finite = sender.finish_but_last() + self._rider_sums.sum()
            self._coordinator.see(self._word, finite if unbroken else None, status.moved() if unbroken else None)

        def share() -> bool:
            self._rider_sums.zero_()
            target = Target(self._product, self._rider_sums, sender.ready)
            if isinstance(work, Steady) and v is not None and sender.at_once:
                work.start(v, target, see)
                return True
            work(v, target)
            return False

        if failure is None:
            shared, failure = capture(share)
            seen = bool(shared)
        if failure is not None:
            self._rider_sums.zero_()
            self._product[: sender.end].zero_()
        if not seen:
            see()
        return failure

    def finish(
        self, status: Status, failure: BaseException | None, add: Sequence[tuple[Tensor, float]] = ()
    ) -> Reduced:
        """The product of which all ranks have written their shares."""
        self.send(status, failure, add)
        verdict = self._coordinator.read(self._word, search=status.search)
        return Reduced(self._product, self._rider_sums, verdict)

    def send(
        self, status: Status, failure: BaseException | None, add: Sequence[tuple[Tensor, float]] = ()
    ) -> tuple[Tensor, Tensor]:
        """The same, with a status word that is still to be read: both are written on a GPU, which is not waited for."""
        self._coordinator.tell(self._word, status.proposal, failure)
        self._sender.finish()
        for vector, factor in add:
            self._product.add_(vector, alpha=factor)
        return self._product, self._word

    def spread(self, parts: Sequence[Part], owners: Sequence[int], r: Tensor) -> Tensor:
        """Every rank calls all parts, since all have the whole vector."""
        out = torch.zeros_like(r)
        r_pieces, out_pieces = self._parameters.split(r), self._parameters.split(out)
        for part in parts:
            part(r_pieces, out_pieces)
        return out


class _Sender(Protocol):
    """How a buffer of status, riders and product is all-reduced."""

    at_once: bool  # whether all is sent at the end

    @property
    def ready(self) -> Callable[[int], None] | None:
        """See :class:`Target`."""

    def begin(self) -> None:
        """A product is about to be written."""

    @property
    def end(self) -> int:
        """The end of what of the product is still this rank's alone."""

    def finish_but_last(self) -> Tensor:
        """Send all that goes without the status; the sum of this rank's product as it is sent, finite if that is."""

    def finish(self) -> None:
        """Send the rest, and wait until all is summed."""


class _Buckets:
    """The parts of one buffer, all-reduced from the last to the first as they become ready."""

    def __init__(
        self, coordinator: Coordinator, buffer: Tensor, head: int, sizes: Sequence[int], least: int | None
    ) -> None:
        self._coordinator, self._buffer, self._head = coordinator, buffer, head
        cuts = [0] if least is None else _cuts(sizes, head, least)
        self._parts = list(zip(cuts, [*cuts[1:], buffer.numel()], strict=True))[::-1]
        self.at_once = len(self._parts) == 1
        starts = itertools.accumulate(sizes[:-1], initial=head)
        # an empty parameter is nobody's
        self._part_of = [
            next((i for i, (a, b) in enumerate(self._parts) if size and a <= start < b), -1)
            for start, size in zip(starts, sizes, strict=True)
        ]
        self._wanted = [self._part_of.count(i) for i in range(len(self._parts))]

    @property
    def ready(self) -> Callable[[int], None] | None:
        """Starts parts early, where there are several."""
        return None if self.at_once else self._ready  # kept, it would be a cycle that holds the buffer

    def begin(self) -> None:
        """Nothing is ready."""
        self._missing = list(self._wanted)
        self._started: list[Pending] = []
        self._finite = torch.zeros((), dtype=self._buffer.dtype, device=self._buffer.device)

    @property
    def end(self) -> int:
        """The end of what is still this rank's alone, counted from the start of the product."""
        begun = len(self._started)
        return (self._parts[begun][1] if begun < len(self._parts) else self._head) - self._head

    def _ready(self, parameter: int) -> None:
        """A parameter's part of the product is final; parts start in their order, but for the last, which has the status."""
        if self._part_of[parameter] >= 0:
            self._missing[self._part_of[parameter]] -= 1
        while len(self._started) < len(self._parts) - 1 and self._missing[len(self._started)] == 0:
            self._start()

    def finish_but_last(self) -> Tensor:
        """Start all parts but the one with the status; the sum of this rank's product, finite if that is."""
        while len(self._started) < len(self._parts) - 1:
            self._start()
        first, end = self._parts[-1]
        return self._finite + self._buffer[max(first, self._head) : end].sum()

    def finish(self) -> None:
        """All-reduce the rest, and wait for all parts."""
        first, end = self._parts[-1]
        if len(self._parts) == 1:
            self._coordinator.all_reduce(self._buffer)
            return
        self._started.append(self._coordinator.start_all_reduce(self._buffer[first:end]))
        for pending in self._started:
            self._coordinator.wait(pending)

    def _start(self) -> None:
        first, end = self._parts[len(self._started)]
        part = self._buffer[first:end]
        self._finite += part.sum()
        self._started.append(self._coordinator.start_all_reduce(part))


class _Rounding:
    """The product sent in a shorter dtype, status and riders apart from it."""

    ready: Callable[[int], None] | None = None
    at_once = False

    def __init__(self, coordinator: Coordinator, head: Tensor, product: Tensor, dtype: torch.dtype) -> None:
        self._coordinator, self._head, self._product = coordinator, head, product
        self._sent = torch.zeros_like(product, dtype=dtype)
        self.end = product.numel()

    def begin(self) -> None:
        """There is nothing to prepare."""

    def finish_but_last(self) -> Tensor:
        """Round and start the product; what overflows by that is not finite either."""
        self._sent.copy_(self._product)
        finite = self._sent.sum(dtype=self._product.dtype)
        self._started = self._coordinator.start_all_reduce(self._sent)
        return finite

    def finish(self) -> None:
        """All-reduce the status, and wait for the product."""
        self._coordinator.all_reduce(self._head)
        self._coordinator.wait(self._started)
        self._product.copy_(self._sent)


def _cuts(sizes: Sequence[int], head: int, least: int) -> list[int]:
    """Where a buffer is cut: at parameters, such that no part, counted from the end, is shorter than ``least`` numbers."""
    cuts, end = [0], head + sum(sizes)
    place = end
    for size in reversed(sizes):
        place -= size
        if end - place >= least and place > head:
            cuts.insert(1, place)
            end = place
    return cuts


class Pieces:
    """Every rank holds one of P equal pieces of every vector; the last are filled up with zeros.

    Args:
        coordinator: How ranks agree.
        parameters: Whose vectors these are.
        riders: How many numbers ride along.
    """

    def __init__(self, coordinator: Coordinator, parameters: Parameters, riders: int) -> None:
        size = coordinator.comm.size
        self._coordinator, self._parameters, self._riders = coordinator, parameters, riders
        k = math.ceil(parameters.numel / size)
        options: dict[str, Any] = {"dtype": parameters.dtype, "device": parameters.device}
        self._n = parameters.numel
        self._gathered, self._summed = torch.zeros(k * size, **options), torch.zeros(k * size, **options)
        self._piece = torch.zeros(k, **options)
        self._space = _InPieces(coordinator, self._gathered, self._n, k)
        self.space: VectorSpace = self._space

    def reduce(self, work: Work, v: Tensor | None, status: Status, add: Sequence[tuple[Tensor, float]] = ()) -> Reduced:
        """See :class:`Reduction`."""
        failure, given = status.failure, v
        if v is not None and failure is None:
            _, failure = capture(lambda: self._space.check(v))
        if given is None or failure is not None:
            given = self._piece.zero_()
        self._coordinator.all_gather(given, self._gathered)
        riders = torch.zeros(self._riders, dtype=self._summed.dtype, device=self._summed.device)
        out = self._summed[: self._n]
        if failure is None:
            whole = None if v is None else self._gathered[: self._n]
            _, failure = capture(lambda: work(whole, Target(out, riders)))
        if failure is not None:
            self._summed.zero_()
            riders.zero_()
        self._summed[self._n :].zero_()
        finite = self._summed.sum() + riders.sum()
        moved = status.moved() if failure is None else None
        self._coordinator.reduce_scatter(self._summed, self._piece)
        for vector, factor in add:
            self._piece.add_(vector, alpha=factor)
        pairs = [] if v is None or failure is not None else [(v, self._piece), (v, v), (self._piece, self._piece)]
        head = torch.zeros(Coordinator.WIDTH + self._riders + 3, dtype=torch.float64, device=self._summed.device)
        word, sums = head[: Coordinator.WIDTH], head[Coordinator.WIDTH :]
        sums[: self._riders] = riders
        if pairs:
            sums[self._riders :] = self._space.local(*pairs)
        self._coordinator.fill(word, proposal=status.proposal, failure=failure, finite=finite, moved=moved)
        self._coordinator.all_reduce(head)
        verdict = self._coordinator.read(word, search=status.search)
        riders.copy_(sums[: self._riders])
        self._space.know(pairs, sums[self._riders :].tolist())
        return Reduced(self._piece, riders, verdict)

    def spread(self, parts: Sequence[Part], owners: Sequence[int], r: Tensor) -> Tensor:
        """Each rank calls its own parts, in the memory of the products."""
        self._coordinator.all_gather(r, self._gathered)
        self._summed.zero_()
        whole, out = (self._parameters.split(vector[: self._n]) for vector in (self._gathered, self._summed))

        def work() -> None:
            for part, owner in zip(parts, owners, strict=True):
                if owner == self._coordinator.comm.rank:
                    part(whole, out)

        _, failure = capture(work)
        if failure is not None:
            self._summed.zero_()
            self._space.defer(failure)
        z = torch.empty_like(self._piece)
        self._coordinator.reduce_scatter(self._summed, z)
        return z


class _InPieces:
    """The VectorSpace of vectors of which every rank holds one piece, shape (k,).

    Inner products of the last product come with it; all others take one small all-reduce, in which the status rides.
    """

    def __init__(self, coordinator: Coordinator, gathered: Tensor, n: int, k: int) -> None:
        self._coordinator, self._gathered, self._n, self._k = coordinator, gathered, n, k
        self.local = LocalDots()
        self._known: list[tuple[Tensor, int, Tensor, int, float]] = []
        self._failure: BaseException | None = None

    def dots(self, *pairs: tuple[Tensor, Tensor]) -> list[float]:
        """``x·y`` over all pieces, the same bits on every rank.

        Raises:
            RankError: If a guarded function has failed on a rank since the last inner product.
        """
        known = [self._recall(x, y) for x, y in pairs]
        if self._failure is None and all(value is not None for value in known):
            return [value for value in known if value is not None]
        failure, self._failure = self._failure, None
        like = torch.empty(0, dtype=torch.float64, device=self._gathered.device)
        return self._coordinator.total(lambda: self.local(*pairs), (len(pairs),), like, failure=failure).tolist()

    def size(self, v: Tensor) -> int:
        """n."""
        return self._n

    def piece(self, whole: Tensor) -> Tensor:
        """This rank's k numbers, as a copy: a view would keep the whole alive."""
        first = self._coordinator.comm.rank * self._k
        piece = whole[first : first + self._k]
        return torch.nn.functional.pad(piece, (0, self._k - len(piece))) if len(piece) < self._k else piece.clone()

    def whole(self, piece: Tensor) -> Tensor:
        """All pieces, gathered; a new tensor. Collective."""
        self._coordinator.all_gather(piece, self._gathered)
        return self._gathered[: self._n].clone()

    def guarded(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The function; where it fails on a rank, all ranks raise in the next inner product."""

        def call(r: Tensor) -> Tensor:
            z, failure = capture(lambda: function(r))
            if isinstance(failure, (RankError, CommunicationError)):  # all ranks know
                raise failure
            if failure is not None:
                self.defer(failure)
            return torch.zeros_like(r) if z is None else z

        return call

    def defer(self, failure: BaseException) -> None:
        """Tell of a failure in the next inner product."""
        self._failure = self._failure or failure

    def check(self, v: Tensor) -> None:
        """Raise ValueError unless v is this rank's piece of a vector."""
        if v.shape != (self._k,) or v.dtype != self._gathered.dtype or v.device != self._gathered.device:
            raise ValueError(
                f"expected a piece of shape ({self._k},), {self._gathered.dtype} on {self._gathered.device}, got "
                f"{tuple(v.shape)}, {v.dtype} on {v.device}; operator.space.piece(v) cuts it from a whole vector"
            )

    def know(self, pairs: Sequence[tuple[Tensor, Tensor]], values: Sequence[float]) -> None:
        """Inner products that have been taken already, for as long as the vectors stay as they are."""
        self._known = [(x, x._version, y, y._version, value) for (x, y), value in zip(pairs, values, strict=False)]

    def _recall(self, x: Tensor, y: Tensor) -> float | None:
        for a, a_version, b, b_version, value in self._known:
            if ((a is x and b is y) or (a is y and b is x)) and a._version == a_version and b._version == b_version:
                return value
        return None
