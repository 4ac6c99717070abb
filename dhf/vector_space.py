"""VectorSpace: inner products of flat vectors, accumulated in float64, however the vectors are stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Replicated", "VectorSpace"]


class VectorSpace(Protocol):
    """The seam through which solvers take inner products."""

    def dots(self, pairs: Sequence[tuple[Tensor, Tensor]], norms: Sequence[Tensor] = ()) -> list[float]:
        """``x·y`` for each pair, then ``‖x‖`` for each of ``norms``, together: a device or a network is waited for once.

        The inner products are accumulated in float64. The norms are as precise as the vectors, which serves thresholds
        and costs a fifth.
        """


class Replicated:
    """Vectors of which every rank holds the whole: inner products need no communication."""

    def dots(self, pairs: Sequence[tuple[Tensor, Tensor]], norms: Sequence[Tensor] = ()) -> list[float]:
        """``x·y`` for each pair of shape (n,), summed in float64, then ``‖x‖`` for each of ``norms``."""
        wide: dict[int, Tensor] = {}
        for x in (x for pair in pairs for x in pair):
            if id(x) not in wide:
                wide[id(x)] = x.double()
        numbers = [torch.dot(wide[id(x)], wide[id(y)]) for x, y in pairs]
        found = torch.stack([*numbers, *(torch.linalg.vector_norm(x).double() for x in norms)]).tolist()
        for i, x in enumerate(norms, start=len(pairs)):
            if found[i] in (0.0, math.inf):  # float32 squares end at 1e-45 and 3e38
                found[i] = float(torch.linalg.vector_norm(x.double()))
        return found
