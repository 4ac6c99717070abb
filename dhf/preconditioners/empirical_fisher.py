"""empirical_fisher: Martens' diagonal, from the squared gradients of single samples.

z = (1/N Σ_i ∇f_i ∘ ∇f_i + damping)^-exponent ∘ r
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from dhf.curvature.per_sample import add_squared_gradients
from dhf.curvature.shard import MicroBatch
from dhf.operator import GlobalOperator
from dhf.replay import SteadyMap

__all__ = ["empirical_fisher"]


def empirical_fisher(operator: GlobalOperator, damping: float, *, exponent: float = 0.75) -> Callable[[Tensor], Tensor]:
    """A diagonal preconditioner for ``A + damping·I``; costs a few gradients.

    Args:
        operator: A, undamped; its data are differentiated sample by sample.
        damping: Added to the diagonal; must be positive, since a sample's gradients can vanish.
        exponent: 0.75 is Martens'; 1 trusts the diagonal whole.

    Returns:
        A function from r to z, as the operator stores vectors, symmetric positive definite.

    Raises:
        ValueError: If damping or exponent is out of range.
        UsageError: If the loss cannot be differentiated sample by sample.

    Source: Martens (2010), section 4.7; there a sum over samples, here a mean, as the objective is.
    """
    if not damping + operator.objective.weight_decay > 0:
        raise ValueError(f"the empirical-Fisher preconditioner needs positive damping, got {damping}")
    if not 0 <= exponent <= 1:
        raise ValueError(f"exponent must be in [0, 1], got {exponent}")

    def add(part: MicroBatch, out: Sequence[Tensor]) -> None:
        add_squared_gradients(operator.objective, operator.parameters, part, out[0])

    (squares,) = operator.sums(add, [(operator.shape[0],)])
    scale = operator.space.piece(squares.add_(damping + operator.objective.weight_decay).pow_(-exponent))
    return SteadyMap(lambda r: scale * r)
