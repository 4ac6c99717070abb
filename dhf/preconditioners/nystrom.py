"""Nystrom: a preconditioner from a randomised low-rank approximation, A ≈ U Λ Uᵀ, that a new damping does not outdate.

P⁻¹ r = (λ_k + μ) U (Λ + μI)⁻¹ Uᵀ r + (r - U Uᵀ r)

Weight decay is taken out of A and put to μ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dhf.operator import GlobalOperator

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
        if stale or len(self._vectors) != operator.shape[0]:
            self._renew(operator)
            self._applied = 0
        self._calls += 1
        U, smallest = self._vectors, self._values[-1] + mu
        scale = smallest / (self._values + mu) - 1.0

        def apply(r: Tensor) -> Tensor:
            self._applied += 1
            return r + U @ (scale * (U.T @ r))

        return apply

    def _renew(self, operator: GlobalOperator) -> None:
        n = operator.shape[0]
        k = min(self._rank, n)
        generator = torch.Generator().manual_seed(self._seed + self._calls)
        directions, _ = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64, generator=generator))
        directions = directions.to(operator.device, operator.dtype)
        images = torch.stack([operator.matvec(direction) for direction in directions.T.contiguous()], dim=1).double()
        directions = directions.double()
        images -= operator.objective.weight_decay * directions  # is damping; in A it would fill the spectrum's tail
        eps = torch.finfo(operator.dtype).eps
        nu = n**0.5 * eps * max(float(torch.linalg.matrix_norm(images)), 1e-150)  # positive for A = 0, too
        images += nu * directions  # keeps the small matrix positive definite in rounding
        core = directions.T @ images
        core = 0.5 * (core + core.T)
        factor, info = torch.linalg.cholesky_ex(core)
        while int(info):
            core.diagonal().add_(10 * nu)
            factor, info = torch.linalg.cholesky_ex(core)
            nu *= 10
        B = torch.linalg.solve_triangular(factor, images.T, upper=False).T
        # the left singular vectors of B by way of its k x k Gram matrix would square its condition
        U, singular, _ = torch.linalg.svd(B, full_matrices=False)
        self._vectors = U.to(operator.dtype)
        self._values = (singular.square() - nu).clamp_(min=0).to(operator.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Vectors, values and counters, as tensors and plain values."""
        return {"calls": self._calls, "applied": self._applied, "vectors": self._vectors, "values": self._values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of :meth:`state_dict`."""
        self._calls, self._applied = int(state["calls"]), int(state["applied"])
        self._vectors, self._values = state["vectors"].clone(), state["values"].clone()
