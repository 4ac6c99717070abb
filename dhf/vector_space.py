"""VectorSpace: inner products of flat vectors, accumulated in float64, however the vectors are stored."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Replicated", "VectorSpace"]


_BLOCK = 1 << 15  # two float64 blocks of this many numbers stay in a core's second-level cache


class VectorSpace(Protocol):
    """The seam through which solvers take inner products."""

    def dots(self, *pairs: tuple[Tensor, Tensor]) -> list[float]:
        """``x·y`` for each pair, accumulated in float64; taken together, so that a device or a network is waited for once."""


class Replicated:
    """Vectors of which every rank holds the whole: inner products need no communication."""

    def __init__(self) -> None:
        self._scratch: dict[int, Tensor] = {}

    def dots(self, *pairs: tuple[Tensor, Tensor]) -> list[float]:
        """``x·y`` for each pair of shape (n,), accumulated in float64."""
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
        sums = torch.stack(parts).view(-1, len(distinct)).sum(0).tolist()
        return [sums[distinct.index(pair)] for pair in wanted]

    def _wide(self, slot: int, block: Tensor) -> Tensor:
        if block.dtype == torch.float64:
            return block
        if block.device.type != "cpu":
            return block.double()
        if slot not in self._scratch:
            self._scratch[slot] = torch.empty(_BLOCK, dtype=torch.float64)
        return self._scratch[slot][: len(block)].copy_(block)
