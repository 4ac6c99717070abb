"""VectorSpace: what solvers know of flat vectors, however these are stored: inner products, accumulated in float64.

A rank holds each vector whole, or one piece of it. Sums, multiples and diagonals are the same in both, element by element; what
is not goes through this seam.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["LocalDots", "Replicated", "VectorSpace"]

_BLOCK = 1 << 15  # two float64 blocks of this many numbers stay in a core's second-level cache


class VectorSpace(Protocol):
    """The seam between solvers and how vectors are stored."""

    def dots(self, *pairs: tuple[Tensor, Tensor]) -> list[float]:
        """``x·y`` for each pair, accumulated in float64; taken together, so that a device or a network is waited for once."""

    def size(self, v: Tensor) -> int:
        """The length n of a vector, of which this rank may hold a piece."""

    def piece(self, whole: Tensor) -> Tensor:
        """What this rank holds of a vector of shape (n,); a view where that is possible."""

    def whole(self, piece: Tensor) -> Tensor:
        """The vector of shape (n,) of which every rank gives what it holds. Collective where vectors are in pieces."""

    def guarded(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """A user's function of a vector, such that ranks meet in the next inner product also where it fails on one."""


class Replicated:
    """Vectors of which every rank holds the whole: nothing here needs communication."""

    def __init__(self) -> None:
        self._local = LocalDots()

    def dots(self, *pairs: tuple[Tensor, Tensor]) -> list[float]:
        """``x·y`` for each pair of shape (n,), accumulated in float64."""
        return self._local(*pairs).tolist()

    def size(self, v: Tensor) -> int:
        """The vector's own length."""
        return v.numel()

    def piece(self, whole: Tensor) -> Tensor:
        """The vector itself."""
        return whole

    def whole(self, piece: Tensor) -> Tensor:
        """The vector itself."""
        return piece

    def guarded(self, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The function itself: what fails is told with the next product."""
        return function


class LocalDots:
    """``x·y`` of what this rank holds, accumulated in float64, with scratch space that is kept."""

    def __init__(self) -> None:
        self._scratch: dict[int, Tensor] = {}

    def __call__(self, *pairs: tuple[Tensor, Tensor]) -> Tensor:
        """One float64 number per pair, shape (pairs,), on the vectors' device."""
        vectors = list({id(x): x for pair in pairs for x in pair}.values())
        places = {id(x): i for i, x in enumerate(vectors)}
        wanted = [(places[id(x)], places[id(y)]) for x, y in pairs]
        distinct = list(dict.fromkeys(wanted))
        # on a CPU block by block: float64 copies of whole vectors would cost more in memory traffic than the sums
        size = _BLOCK if vectors[0].device.type == "cpu" else len(vectors[0])
        parts: list[Tensor] = []
        for blocks in zip(*(x.split(max(size, 1)) for x in vectors), strict=True):
            wide = [self._wide(i, block) for i, block in enumerate(blocks)]
            parts += [torch.dot(wide[i], wide[j]) for i, j in distinct]
        sums = torch.stack(parts).view(-1, len(distinct)).sum(0)
        # by a list of indices, a device would wait for the host that sends it, and refuse to be recorded
        return sums if wanted == distinct else torch.stack([sums[distinct.index(pair)] for pair in wanted])

    def _wide(self, slot: int, block: Tensor) -> Tensor:
        if block.dtype == torch.float64:
            return block
        if block.device.type != "cpu":
            return block.double()
        if slot not in self._scratch:
            self._scratch[slot] = torch.empty(_BLOCK, dtype=torch.float64)
        return self._scratch[slot][: len(block)].copy_(block)
