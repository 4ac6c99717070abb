"""Nystrom: a preconditioner from a randomised low-rank approximation, A ≈ U Λ Uᵀ, that a new damping does not outdate.

P⁻¹ r = (λ_k + μ) U (Λ + μI)⁻¹ Uᵀ r + (r - U Uᵀ r)

Weight decay is taken out of A and put to μ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dhf.coordinator import Coordinator
from dhf.objective import Objective
from dhf.operator import GlobalOperator
from dhf.replay import SteadyMap

__all__ = ["Nystrom"]


class Nystrom:
    """Makes preconditioners for ``A + damping·I`` that flatten the largest eigenvalues of a positive semi-definite A.

    Args:
        rank: Directions sampled; a refresh costs as many products. At most the number of parameters.
        refresh: Calls between new samples; damping is renewed with each. By default new samples are taken once the old ones have
            been applied ``rank`` times: as many iterations as the renewal costs products, so that at most twice the products
            are taken that the best schedule would have taken.
        seed: Names the directions; the same on all ranks.

    Source: Frangella, Tropp & Udell, "Randomized Nyström preconditioning" (2023), algorithms 2.1 and 5.1.
    """

    def __init__(self, *, rank: int = 100, refresh: int | None = None, seed: int = 0) -> None:
        for name, value in (("rank", rank), ("refresh", refresh)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._rank, self._refresh, self._seed, self._calls = rank, refresh, seed, 0
        self._applied = 0
        self._vectors, self._values = torch.zeros(0, 0), torch.zeros(0)
        self._length = 0  # of the vectors, of which this rank may hold its rows alone

    def __call__(self, operator: GlobalOperator, damping: float) -> Callable[[Tensor], Tensor]:
        """The preconditioner ``r -> z`` for this damping, symmetric positive definite. Takes products where it is renewed.

        Raises:
            ValueError: If damping, weight decay included, is not positive.
            NonFiniteError: If a product is not finite.
        """
        mu = damping + operator.objective.weight_decay
        if not mu > 0:
            raise ValueError(f"the Nystrom preconditioner needs positive damping, got {damping}")
        stale = self._applied >= self._rank if self._refresh is None else self._calls % self._refresh == 0
        if stale or self._length != operator.shape[0]:
            self._renew(operator)
            self._applied = 0
        self._calls += 1
        U, smallest = self._stored_as(operator), self._values[-1] + mu
        scale = smallest / (self._values + mu) - 1.0

        def count() -> None:
            self._applied += 1

        def apply(r: Tensor) -> Tensor:
            if not operator.in_pieces:
                return r + U @ (scale * (U.T @ r))
            inner = operator.coordinator.total(lambda: U.T @ r, (U.shape[1],), r)
            return r + U @ (scale * inner)

        return SteadyMap(apply, count)

    def _stored_as(self, operator: GlobalOperator) -> Tensor:
        """U as the operator stores vectors, one per column."""
        if operator.in_pieces and self.is_whole:
            self._vectors = _rows(self._vectors, operator.comm.rank, operator.comm.size)
        return self._vectors

    def _renew(self, operator: GlobalOperator) -> None:
        """Sample directions, and divide what follows by rows over the ranks."""
        n, rank, size = operator.shape[0], operator.comm.rank, operator.comm.size
        k = min(self._rank, n)
        small = torch.zeros(0, dtype=torch.float64, device=operator.device)

        def total(work: Callable[[], Tensor | None], *shape: int) -> Tensor:
            return operator.coordinator.total(work, shape, small)

        generator = torch.Generator().manual_seed(self._seed + self._calls)
        draws = torch.randn(n, k, dtype=torch.float64, generator=generator).to(operator.device)
        if n < 4 * k:  # few rows: they may be nearly dependent
            draws, _ = torch.linalg.qr(draws)
        else:  # a tall Gaussian matrix is well-conditioned, and so is the Cholesky factor of its Gram matrix
            mine = _rows(draws, rank, size)
            gram = total(lambda: mine.T @ mine, k, k)
            draws = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), draws.T, upper=False).T
        directions = draws.to(operator.dtype)
        mine = _rows(directions, rank, size).double()
        images = torch.empty_like(mine)
        for j in range(k):
            image = operator.matvec(operator.space.piece(directions[:, j].contiguous()))
            images[:, j] = image if operator.in_pieces else _rows(image, rank, size)
        del draws, directions
        images -= operator.objective.weight_decay * mine  # is damping; in A it would fill the spectrum's tail
        parts = total(lambda: torch.stack([mine.T @ images, mine.T @ mine, images.T @ images]), 3, k, k)
        eps = torch.finfo(operator.dtype).eps
        nu = n**0.5 * eps * max(float(parts[2].trace()) ** 0.5, 1e-150)  # positive for A = 0, too
        images += nu * mine  # keeps the small matrix positive definite in rounding
        core = parts[0] + nu * parts[1]
        core = 0.5 * (core + core.T)
        factor, info = torch.linalg.cholesky_ex(core)
        while int(info):
            core.diagonal().add_(10 * nu)
            factor, info = torch.linalg.cholesky_ex(core)
            nu *= 10
        B = torch.linalg.solve_triangular(factor, images.T, upper=False).T
        # the left singular vectors of B by way of its k x k Gram matrix would square its condition; so by its QR
        # factorisation, that of the ranks' triangles under one another
        Q, R = torch.linalg.qr(B)

        def triangle() -> Tensor:
            out = small.new_zeros(size, k, k)
            out[rank, : len(R)] = R
            return out

        triangles = total(triangle, size, k, k)
        inner, singular, _ = torch.linalg.svd(triangles.view(size * k, k), full_matrices=False)
        own = (Q @ inner[rank * k : rank * k + Q.shape[1]]).to(operator.dtype)
        self._values = (singular.square() - nu).clamp_(min=0).to(operator.dtype)
        self._length = n
        self._vectors = own if operator.in_pieces or size == 1 else self._whole(operator.coordinator, own)

    def _whole(self, coordinator: Coordinator, own: Tensor) -> Tensor:
        """All ranks' rows."""
        whole = own.new_empty(len(own) * coordinator.comm.size, own.shape[1])
        coordinator.all_gather(own.reshape(-1), whole.view(-1))
        return whole[: self._length].clone()

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds all that is kept, and not its own rows alone."""
        return len(self._vectors) == self._length

    def consolidate(self, coordinator: Coordinator, objective: Objective) -> None:
        """Have every rank hold all that is kept, for :meth:`state_dict`. Collective."""
        if not self.is_whole:
            self._vectors = self._whole(coordinator, self._vectors)

    def state_dict(self) -> dict[str, Any]:
        """Vectors, values and counters, as tensors and plain values."""
        return {
            "calls": self._calls,
            "applied": self._applied,
            "vectors": self._vectors,
            "values": self._values,
            "length": self._length,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of :meth:`state_dict`."""
        self._calls, self._applied = int(state["calls"]), int(state["applied"])
        self._vectors, self._values = state["vectors"].clone(), state["values"].clone()
        self._length = int(state["length"])


def _rows(matrix: Tensor, rank: int, size: int) -> Tensor:
    """A rank's rows of a matrix or vector that is divided over ranks like a vector: equal pieces, the last filled with zeros."""
    k = -(-len(matrix) // size)
    mine = matrix[rank * k : (rank + 1) * k]
    missing = k - len(mine)
    return mine if not missing else torch.cat([mine, mine.new_zeros(missing, *mine.shape[1:])])
