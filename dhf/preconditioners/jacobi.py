"""jacobi: a diagonal preconditioner, its diagonal estimated by Hutchinson probes.

diag(A) ≈ 1/m Σ_j v_j ∘ A v_j,  v_j of random signs;    z = (max(diag, 0) + damping)^-exponent ∘ r
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dhf.operator import GlobalOperator
from dhf.replay import SteadyMap

__all__ = ["jacobi"]


def jacobi(
    operator: GlobalOperator, damping: float, *, probes: int = 10, exponent: float = 0.75, seed: int = 0
) -> Callable[[Tensor], Tensor]:
    """A diagonal preconditioner for ``A + damping·I``; costs ``probes`` products.

    Every rank draws the same signs, so every rank holds the same diagonal.

    Args:
        operator: A, undamped.
        damping: Added to the diagonal; must be positive, since a sampled diagonal can vanish.
        probes: Random vectors; the diagonal's error falls as their square root.
        exponent: 1 is Jacobi; 0.75 flattens the sampling noise, as Martens (2010, section 4.7) does for his diagonal.
        seed: Names the signs.

    Returns:
        A function from r to z, as the operator stores vectors, symmetric positive definite.

    Raises:
        ValueError: If damping is not positive.

    Source: Bekas, Kokiopoulou & Saad (2007).
    """
    if not damping > 0:
        raise ValueError(f"the Jacobi preconditioner needs positive damping, got {damping}")
    generator = torch.Generator().manual_seed(seed)
    diagonal = torch.zeros_like(operator.gradient)
    for _ in range(probes):
        signs = torch.randint(0, 2, (operator.shape[0],), generator=generator).mul_(2).sub_(1).to(diagonal)
        signs = operator.space.piece(signs)
        diagonal.addcmul_(signs, operator.matvec(signs), value=1.0 / probes)
    scale = diagonal.clamp_(min=0).add_(damping).pow_(-exponent)
    return SteadyMap(lambda r: scale * r)
