"""Pieces: every rank holds one piece of every vector: gathered to be multiplied, reduce-scattered as products.

One small all-reduce takes the status word, the riders and the inner products of the pieces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dhf.coordinator import Coordinator, capture
from dhf.errors import CommunicationError, RankError
from dhf.operator.reduction import Part, Reduced, Status, Target, Work
from dhf.parameters import Parameters
from dhf.vector_space import LocalDots, VectorSpace

__all__ = ["Pieces"]


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
