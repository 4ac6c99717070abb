"""Solution: what a solve found, why it ended, and how it went."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from dhf.reason import Reason

__all__ = ["Iterate", "Iteration", "Solution"]


@dataclasses.dataclass(frozen=True, slots=True)
class Iteration:
    """One line of a solve's history.

    Attributes:
        number: Iterations done, 0 at the start.
        residual_norm: ``‖b - A x‖`` as the recursion has it.
        model: The quadratic model ``½ xᵀAx - bᵀx`` at x.
        curvature: ``pᵀAp / pᵀp`` of the direction just taken; nan at the start.
    """

    number: int
    residual_norm: float
    model: float
    curvature: float


@dataclasses.dataclass(frozen=True, slots=True)
class Iterate:
    """An iterate kept on the way.

    Attributes:
        number: Iterations done.
        x: Shape (n,).
        model: The quadratic model ``½ xᵀAx - bᵀx`` at x.
    """

    number: int
    x: Tensor
    model: float


@dataclasses.dataclass(frozen=True, slots=True)
class Solution:
    """The end of a solve.

    Attributes:
        x: The solution, shape (n,).
        reason: Why the solve ended; ``reason > 0`` means converged, ``reason.advice`` says what to do.
        iterations: Iterations that led to x.
        residual_norm: ``‖b - A x‖`` as the recursion has it.
        true_residual_norm: ``‖b - A x‖`` from a product taken at the end; nan if that was not finite, or not asked for.
        model: The quadratic model ``½ xᵀAx - bᵀx`` at x.
        history: One Iteration per iteration, and one for the start.
        iterates: Iterates kept at geometric spacing, the last one x itself; empty unless asked for.
        direction: The direction of non-positive curvature that ended the solve, shape (n,), or None.
    """

    x: Tensor
    reason: Reason
    iterations: int
    residual_norm: float
    true_residual_norm: float
    model: float
    history: list[Iteration]
    iterates: list[Iterate]
    direction: Tensor | None = None

    @property
    def converged(self) -> bool:
        """Whether the solve reached what it was asked for."""
        return self.reason.converged
