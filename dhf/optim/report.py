"""StepReport: what one outer iteration did."""

from __future__ import annotations

import dataclasses

from dhf.reason import Reason
from dhf.solvers import Solution

__all__ = ["StepReport"]


@dataclasses.dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did; the same numbers on every rank, but for seconds.

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
