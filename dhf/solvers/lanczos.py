"""Lanczos: a symmetric operator as a small matrix, in an orthonormal basis that is grown by one product at a time.

    A V = V T + β v eᵀ    V the basis, T = Vᵀ A V, v the next vector, e the last unit vector

What differs from the textbook:
- every new vector is made orthogonal to the whole basis, by one pass where nothing is lost; so no eigenvalue comes twice;
- a basis that is full is replaced by some of its Ritz vectors and v, which keeps this form but for T (thick restart);
- where β vanishes, the vectors span an invariant subspace, and a random direction outside of it takes the place of v;
- an operator that is not symmetric is seen in what the passes take out.

Source: Lanczos (1950); thick restart: Wu & Simon (2000).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dhf.reason import Reason
from dhf.solvers.basis import Basis
from dhf.vector_space import VectorSpace

__all__ = ["Lanczos"]

_ASYMMETRY = 1e-3  # of the norm of A
_ROUNDING = 10.0  # units of ε‖A‖


class Lanczos:
    """The basis and the small matrix.

    Args:
        space: The inner products.
        n: The length of a whole vector.
        start: The first direction, as this rank stores vectors; not zero.
        capacity: Most vectors that have been multiplied at once; at most n.
        draw: Returns a random vector by its number.

    Attributes:
        basis: V, and behind it the vector that is to be multiplied next.
        j: How many vectors of the basis have been multiplied.
        beta: How strongly the next vector couples to the last; 0 where it was drawn.
        scale: The norm of A, as far as it has been seen.
        run: Vectors multiplied since the last was drawn.
    """

    def __init__(self, space: VectorSpace, n: int, start: Tensor, capacity: int, draw: Callable[[int], Tensor]) -> None:
        self.space, self.n, self._draw = space, n, draw
        self.basis = Basis(space, start, min(capacity + 1, n))
        self._T = np.zeros((capacity + 1, capacity + 1))  # the last row and column are the next vector's
        self.j = self.run = self._products = self._kept = 0
        self.beta = self.scale = 0.0
        self._residual: tuple[Tensor, float] | None = None
        self.basis.append(start)

    @property
    def next(self) -> Tensor:
        """The vector to be multiplied."""
        return self.basis.rows[self.j]

    @property
    def full(self) -> bool:
        """Whether there is no room for another vector."""
        return self.j == len(self._T) - 1

    @property
    def complete(self) -> bool:
        """Whether the basis spans the whole space."""
        return self.j == self.n

    @property
    def T(self) -> Tensor:
        """The small matrix, float64 on the CPU, shape (j, j)."""
        return torch.from_numpy(self._T[: self.j, : self.j].copy())

    def advance(self, product: Tensor) -> Reason | None:
        """Take in the product of :attr:`next`; the reason where there is something about it.

        NON_FINITE: it has not been taken in. NOT_SYMMETRIC: no eigenvalue can be trusted. INVARIANT_SUBSPACE: a direction was
        drawn to go on with.
        """
        j, basis, product = self.j, self.basis, product.detach()
        w = basis.rows[j + 1].copy_(product) if j + 1 < len(basis.rows) else product.clone()
        # what is known of the product is taken out first: the pass over the basis would multiply its errors by what it finds
        if j == self._kept:
            basis.subtract(w, torch.from_numpy(self._T[:j, j].copy()))
        elif self.beta:
            w.sub_(basis.rows[j - 1], alpha=self.beta)
        alpha = basis.along(w, j)
        w.sub_(basis.rows[j], alpha=alpha)
        taken, beta = basis.orthogonalise(w)
        alpha += float(taken[j])
        if not (math.isfinite(alpha) and math.isfinite(beta)):
            return Reason.NON_FINITE
        self._T[j, j] = alpha
        self.scale = max(self.scale, math.hypot(alpha, beta, self.beta))
        asymmetric = bool(np.abs(taken).max() > _ASYMMETRY * self.scale)
        self.j, self.beta, self.run, self._products = j + 1, beta, self.run + 1, self._products + 1
        reason = None
        if self.complete:
            self.beta = 0.0
        else:
            least = _ROUNDING * torch.finfo(w.dtype).eps * self.scale
            # in a band around the threshold, since another party may judge a borderline length otherwise
            self._residual = (w.clone(), beta) if beta <= 4 * least else None
            reason = Reason.INVARIANT_SUBSPACE if beta <= least else None
            self._go_on(w, beta, draw=reason is not None)
        return Reason.NOT_SYMMETRIC if asymmetric else reason

    def follow(self, reason: Reason | None) -> None:
        """Go on as all have agreed: with a direction that is drawn (INVARIANT_SUBSPACE), or without."""
        drawn = self.run == 0
        if self.complete or drawn == (reason is Reason.INVARIANT_SUBSPACE):
            return
        if not drawn:
            self._go_on(self.next, self.beta, draw=True)
        elif self._residual is not None:
            self._go_on(*self._residual, draw=False)

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values, ascending; their vectors in V, one per column; and their residual norms; float64 on the CPU."""
        values, vectors = torch.linalg.eigh(self.T)
        coupling = torch.from_numpy(self._T[self.j, : self.j].copy())  # of the next vector
        return values, vectors, (coupling @ vectors).abs()

    def restart(self, values: Tensor, vectors: Tensor) -> None:
        """Keep these Ritz pairs, and the next vector."""
        kept, coupling, following = len(values), self.beta * vectors[-1], self.next.clone()
        self.basis.size = self.j
        self.basis.combine(vectors)
        self.basis.rows[kept] = following
        self.basis.size = kept + 1
        self._T[:] = 0.0
        self._T[range(kept), range(kept)] = values
        self._T[:kept, kept] = self._T[kept, :kept] = coupling
        self.j = self._kept = kept
        self._residual = None

    def _go_on(self, w: Tensor, norm: float, *, draw: bool) -> None:
        """Make w, orthogonal to the basis and of this length, the next vector, or a random one."""
        j, basis = self.j, self.basis
        basis.size = j
        self._T[:j, j] = self._T[j, :j] = 0.0
        if draw or not norm:
            self.beta, self.run = 0.0, 0
            number = self._products
            while not basis.append(self._draw(number)):
                basis.size = j
                number += 1 << 32
            return
        torch.div(w, norm, out=basis.rows[j])
        basis.size = j + 1
        self.beta = norm
        self._T[j - 1, j] = self._T[j, j - 1] = norm
