"""Basis: orthonormal vectors that grow in number, and what is orthogonal to them; one per row, as this rank stores vectors.

w - Vᵀ V w    takes two matrix-vector products with the basis, and once more as many where w has lost most of its length,
              since what is left is then rounding (Daniel, Gragg, Kaufman & Stewart, 1976)
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dhf.vector_space import Replicated, VectorSpace

__all__ = ["Basis"]

_LOST = 0.5  # of a vector's square
_COLUMNS = 1 << 16  # rotated at once


class Basis:
    """Orthonormal vectors in a vector space.

    Args:
        space: The inner products.
        like: A vector as this rank stores it.
        capacity: Most vectors.

    Attributes:
        rows: The vectors, shape (capacity, len(like)), of which the first ``size`` count.
        size: How many there are.
    """

    def __init__(self, space: VectorSpace, like: Tensor, capacity: int) -> None:
        self.space, self.size = space, 0
        self.rows = like.new_zeros(capacity, len(like))
        self._whole = isinstance(space, Replicated)

    def inner(self, w: Tensor) -> Tensor:
        """``V w``, shape (size,), of w's dtype and device, or float64 on the CPU."""
        rows = self.rows[: self.size]
        if self._whole:
            return torch.mv(rows, w)
        return torch.tensor(self.space.dots(*((row, w) for row in rows)) if self.size else [], dtype=torch.float64)

    def subtract(self, w: Tensor, coefficients: Tensor) -> None:
        """``w - Vᵀ c`` in place, from the first ``len(c)`` vectors; c of any dtype and device."""
        if len(coefficients):
            w.addmv_(self.rows[: len(coefficients)].T, coefficients.to(w), alpha=-1)

    def along(self, w: Tensor, i: int) -> float:
        """``w·v`` with the i-th vector; rounded as the vectors are, for what is then corrected by a pass."""
        if self._whole:
            return float(torch.dot(self.rows[i], w))
        return self.space.dots((self.rows[i], w))[0]

    def norm(self, w: Tensor) -> float:
        """``‖w‖``, accumulated in float64."""
        if self._whole:
            return float(torch.linalg.vector_norm(w, dtype=torch.float64))
        (square,) = self.space.dots((w, w))
        return math.sqrt(square) if square >= 0 else math.nan

    def orthogonalise(self, w: Tensor) -> tuple[np.ndarray, float]:
        """Take the basis out of w, in place.

        Returns:
            What has been taken out, shape (size,), float64 on the CPU, and the norm of what is left.
        """
        taken = np.zeros(self.size)
        for _ in range(3):
            h = self.inner(w)
            self.subtract(w, h)
            h64 = h.cpu().numpy().astype(np.float64)
            taken += h64
            norm = self.norm(w)
            if not norm * norm < _LOST * (norm * norm + float(h64 @ h64)):
                break
        return taken, norm

    def append(self, w: Tensor) -> float:
        """Add the direction of w that is orthogonal to the basis, and return the length of w in it.

        Where next to nothing is left of w, a row of zeros is added and 0.0 returned.
        """
        row = self.rows[self.size]
        row.copy_(w)
        before = self.norm(row)
        _, norm = self.orthogonalise(row)
        if norm <= 100 * torch.finfo(w.dtype).eps * before:
            row.zero_()
            norm = 0.0
        else:
            row.div_(norm)
        self.size += 1
        return norm

    def combine(self, coefficients: Tensor) -> None:
        """Replace the vectors by ``cᵀ V``; c float64 on the CPU, shape (size, fewer)."""
        c = coefficients.to(self.rows).T.contiguous()
        for columns in self.rows.split(_COLUMNS, dim=1):  # so that little is held twice
            columns[: len(c)] = c @ columns[: self.size]
        self.size = len(c)
