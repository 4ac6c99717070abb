"""Reason: why a solve, a step or a run ended; positive converged, negative did not, each with its advice.

Signs follow PETSc's converged reasons. The integers travel between ranks inside status words, where
they are summed and squared exactly in float32; so their magnitudes stay small.
"""

from __future__ import annotations

import enum

__all__ = ["Reason"]


class Reason(enum.IntEnum):
    """Outcome of a solve, a step or a run. ``reason > 0`` means it reached what it was asked for."""

    # solves
    RESIDUAL_TOLERANCE = 1
    RELATIVE_PROGRESS = 2
    ZERO_RIGHT_HAND_SIDE = 3
    TRUST_REGION_BOUNDARY = 8
    LEAST_SQUARES_SOLUTION = 9
    RESIDUAL_REPLACED = 10
    INVARIANT_SUBSPACE = 11
    # steps
    STEP_ACCEPTED = 4
    GRADIENT_ZERO = 5
    # runs
    TARGET_REACHED = 6
    STEPS_DONE = 7

    # solves
    ITERATION_LIMIT = -1
    NEGATIVE_CURVATURE = -2
    NON_FINITE = -3
    ACCURACY_LOST = -4
    INDEFINITE_PRECONDITIONER = -5
    NOT_SYMMETRIC = -14
    # steps
    NO_DECREASE = -6
    # runs
    TIME_LIMIT = -7
    INTERRUPTED = -8
    DIVERGED = -9
    RANK_FAILED = -10
    COMMUNICATION_FAILED = -11
    UNUSABLE_INPUT = -12
    NOT_SAVED = -13

    @property
    def converged(self) -> bool:
        """True when the solve, step or run reached what it was asked for."""
        return self > 0

    @property
    def advice(self) -> str:
        """One sentence: what happened, and what to do about it."""
        return _ADVICE[self]

    @property
    def words(self) -> str:
        """The name as lower-case words, for tables and prose."""
        return self.name.lower().replace("_", " ")


_ADVICE = {
    Reason.RESIDUAL_TOLERANCE: "The residual norm fell below the tolerance.",
    Reason.RELATIVE_PROGRESS: "The quadratic model stopped improving; iterating longer would not pay.",
    Reason.ZERO_RIGHT_HAND_SIDE: "The right-hand side is zero, and so is the solution.",
    Reason.TRUST_REGION_BOUNDARY: "The solution stands on the trust region's boundary, where the model is lowest along the path.",
    Reason.LEAST_SQUARES_SOLUTION: (
        "The system has no exact solution (the matrix is singular); the residual is as small as it can be."
    ),
    Reason.RESIDUAL_REPLACED: "The residual was taken anew from the data; the solve goes on.",
    Reason.INVARIANT_SUBSPACE: "The operator maps the vectors found so far into one another; a new direction was drawn.",
    Reason.STEP_ACCEPTED: "The step lowered the objective and was taken.",
    Reason.GRADIENT_ZERO: "The gradient is zero: the parameters are at a stationary point.",
    Reason.TARGET_REACHED: "The loss fell below the target.",
    Reason.STEPS_DONE: "All steps asked for were taken.",
    Reason.ITERATION_LIMIT: "The iteration limit came first: raise max_iterations, loosen rtol, or use a preconditioner.",
    Reason.NEGATIVE_CURVATURE: (
        "A direction of non-positive curvature was met: raise the damping, use the Gauss-Newton matrix, or use minres."
    ),
    Reason.NON_FINITE: "A product holds NaN or infinity: look at the named rank's data and at the scale of the loss.",
    Reason.ACCURACY_LOST: (
        "The recursive residual claims convergence but the true one does not agree: "
        "use float64, a looser rtol or a preconditioner."
    ),
    Reason.INDEFINITE_PRECONDITIONER: "The preconditioner is not positive definite: check that M(r)·r > 0 for every r.",
    Reason.NOT_SYMMETRIC: "The operator is not symmetric: check that u·(A v) = v·(A u), and that its products are deterministic.",
    Reason.NO_DECREASE: "No tried step lowered the objective; parameters were left alone and the damping was raised.",
    Reason.TIME_LIMIT: "The time budget, or that of the SLURM job, ran out: resume from the checkpoint.",
    Reason.INTERRUPTED: "A stop signal arrived: resume from the checkpoint.",
    Reason.DIVERGED: "The run cannot go on: the objective is non-finite, or step after step found no decrease.",
    Reason.RANK_FAILED: "A rank failed: its error and traceback are given; mend that, and resume from the checkpoint.",
    Reason.COMMUNICATION_FAILED: "The ranks lost one another: look at the missing rank, and resume from the checkpoint.",
    Reason.NOT_SAVED: "The last checkpoint could not be written: make room, and resume from the newest that is whole.",
    Reason.UNUSABLE_INPUT: "A flag, a file or the data cannot be used: the error says which and what to do.",
}
