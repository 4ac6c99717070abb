"""StepReport: what one outer iteration did."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from dhf.curvature import NonFinite
from dhf.phases import Profile
from dhf.reason import Reason
from dhf.solvers import Solution

__all__ = ["StepReport", "in_gradients"]


@dataclasses.dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did; the same numbers on every rank, but for the seconds.

    Attributes:
        reason: STEP_ACCEPTED, NO_DECREASE or GRADIENT_ZERO, or why the run must stop.
        loss: The objective at the step's start.
        loss_after: The objective at its end, on the same samples.
        gradient_norm: Euclidean norm of the gradient at the start.
        step_length: Factor on the solve's direction; 0 when parameters were left alone.
        damping: λ used in this step's solve.
        reduction_ratio: Actual over predicted decrease at step length 1; nan without a prediction.
        solve: The linear solve, or None.
        products: Curvature products taken, those of the preconditioner included.
        evaluations: Objective values taken at trial points.
        seconds: Wall time of the step on this rank.
        seconds_waiting: Of these, spent in all-reduces; the rest is this rank's own work.
        non_finite: The ranks whose products held NaN or infinity, if the solve ended NON_FINITE; each with the sample
            where ``debug_nonfinite`` has looked for one.
        fallback: Empty for a step that went as solved; else what rescued it: ``"iterate"``, an earlier iterate of the solve;
            ``"damping"``, more of it, at once or in the next step; ``"gradient"``, its direction.
        radius: Of the trust region in this step's solve, or None.
        gradient_equivalents: What the step has cost, counted by :func:`in_gradients`.
        profile: Where its time went on this rank, if the coordinator's phases are measured.
    """

    reason: Reason
    loss: float
    loss_after: float
    gradient_norm: float
    step_length: float
    damping: float
    reduction_ratio: float
    solve: Solution | None
    products: int
    evaluations: int
    seconds: float
    seconds_waiting: float = 0.0
    non_finite: Mapping[int, NonFinite | None] = dataclasses.field(default_factory=dict)
    fallback: str = ""
    radius: float | None = None
    gradient_equivalents: float = 0.0
    profile: Profile | None = None


# in forward passes: a gradient is one and the backward pass of two; on a kept graph a Gauss-Newton product is J and Jᵀ of two
# each, a Hessian product differentiates both passes of the gradient
_PRODUCTS = {"ggn": 4 / 3, "fisher": 4 / 3, "hessian": 2.0}


def in_gradients(gradients: float, products: float = 0.0, values: float = 0.0, curvature: str = "ggn") -> float:
    """The cost of gradients, products and values of the objective, in gradients, by counting matrix products.

    A gradient counts 1, a value 1/3, a Gauss-Newton or Fisher product 4/3 and a Hessian product 2, all on the same samples. It
    is a count that does not depend on the machine, and no time: what is rebuilt, recorded, factorised, and the vectors' work,
    are not in it.

    Args:
        gradients: Gradients.
        products: Curvature products.
        values: Values of the objective without a gradient.
        curvature: ``"ggn"``, ``"fisher"`` or ``"hessian"``.
    """
    return gradients + _PRODUCTS[curvature] * products + values / 3
