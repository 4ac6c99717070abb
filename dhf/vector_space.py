"""VectorSpace: inner products of flat vectors, accumulated in float64, however the vectors are stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Replicated", "VectorSpace"]


class VectorSpace(Protocol):
    """The seam through which solvers take inner products."""

    def dots(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
        """``x·y`` for each pair, together, so that a device or a network is waited for once."""


class Replicated:
    """Vectors of which every rank holds the whole: inner products need no communication."""

    def dots(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
        """``x·y`` for each pair of shape (n,), summed in float64."""
        return torch.stack([_dot(x, y) for x, y in pairs]).tolist()


def _dot(x: Tensor, y: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        return torch.dot(x, y)
    wide = x.double()
    return torch.dot(wide, wide if y is x else y.double())
