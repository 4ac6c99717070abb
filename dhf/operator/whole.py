"""Whole: every rank holds all of every vector: one all-reduce of [ status word | riders | product ].

It may be sent in parts as they become ready, or rounded; that is a sender's business.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dhf.comm import Pending
from dhf.coordinator import Coordinator, capture
from dhf.operator.reduction import Part, Reduced, Reducer, Status, Target, Work
from dhf.operator.steady import Steady
from dhf.parameters import Parameters
from dhf.vector_space import Replicated, VectorSpace

__all__ = ["Whole"]

_ALIGNED = 16  # numbers; what stands before the product keeps its place in cache lines


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
        # of the share that is in the buffer; one tensor, into which a recording writes as well
        self._finite = torch.zeros((), dtype=parameters.dtype, device=parameters.device)

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
            torch.add(sender.finish_but_last(), self._rider_sums.sum(), out=self._finite)
            self._coordinator.see(self._word, self._finite if unbroken else None, status.moved() if unbroken else None)

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
        # a copy: another share may be written before what was said of this one is read
        finite = self._finite.clone() if failure is None else None
        self._coordinator.tell(self._word, status.proposal, failure, finite)
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
        self._finite = torch.zeros((), dtype=buffer.dtype, device=buffer.device)  # once, for it may be in a recording

    @property
    def ready(self) -> Callable[[int], None] | None:
        """Starts parts early, where there are several."""
        return None if self.at_once else self._ready  # kept, it would be a cycle that holds the buffer

    def begin(self) -> None:
        """Nothing is ready."""
        self._missing = list(self._wanted)
        self._started: list[Pending] = []
        self._finite.zero_()

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
