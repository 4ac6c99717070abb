"""Damping: the λ of ``(B + λI) d = -g``, steered by how well the quadratic model predicted; two schedules.

Both are told of a step once it is judged. A λ below ``smallest`` is not used: in float32 the system is rounding by then.
"""

from __future__ import annotations

import math
from typing import Any

from dhf.optim.outcome import Outcome
from dhf.reason import Reason

__all__ = ["LevenbergMarquardt", "Nielsen", "reduction_ratio", "rounding"]

_LARGEST = 1e12


class LevenbergMarquardt:
    """λ falls by a factor when the model predicts well, and rises when it does not; steps are searched along their length.

    Args:
        damping: The first λ, in the units of the curvature.
        factor: On λ when the reduction ratio is below 1/4; its inverse when it is above 3/4.
        failure: Factor on λ when a step found no decrease, or met negative curvature.
        smallest: Least λ.

    Source: Martens (2010), section 4.1, whose factor is 3/2.
    """

    full_step = False
    radius: float | None = None

    def __init__(self, damping: float, *, factor: float = 3 / 2, failure: float = 4.0, smallest: float = 1e-12) -> None:
        self.damping = _checked(damping, smallest)
        self._factor, self._failure, self._smallest = factor, failure, smallest

    def accept(self, outcome: Outcome) -> None:
        """Follow an accepted step; a ratio that is nan leaves λ alone."""
        if outcome.solve_reason is Reason.NEGATIVE_CURVATURE:
            self.fail(outcome)
        elif outcome.ratio > 0.75:
            self.damping = max(self.damping / self._factor, self._smallest)
        elif outcome.ratio < 0.25:
            self.damping = min(self.damping * self._factor, _LARGEST)

    def fail(self, outcome: Outcome) -> None:
        """Raise λ after a step that found no decrease."""
        self.damping = min(self.damping * self._failure, _LARGEST)

    def state_dict(self) -> dict[str, Any]:
        """λ."""
        return {"damping": self.damping}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of :meth:`state_dict`."""
        self.damping = float(state["damping"])


class Nielsen:
    """λ follows the reduction ratio ρ smoothly, ``λ max(1/3, 1 - (2ρ - 1)³)``; a rejected step doubles its own factor.

    Only whole steps are taken. λ does not fall where the solve ended at its iteration limit: a smaller one would make the next
    system harder still, and its truncated solution no longer the one that the model predicts for.

    Args:
        damping: The first λ, in the units of the curvature.
        smallest: Least λ.

    Source: Nielsen, "Damping parameter in Marquardt's method" (1999); Madsen, Nielsen & Tingleff (2004), section 3.2.
    """

    full_step = True
    radius: float | None = None

    def __init__(self, damping: float, *, smallest: float = 1e-15) -> None:
        self.damping = _checked(damping, smallest)
        self._smallest, self._rise = smallest, 2.0

    def accept(self, outcome: Outcome) -> None:
        """Follow an accepted step."""
        factor = max(1 / 3, 1 - (2 * min(outcome.ratio, 1.0) - 1) ** 3) if outcome.ratio == outcome.ratio else 1.0
        if outcome.solve_reason is Reason.ITERATION_LIMIT:
            factor = max(factor, 1.0)
        self.damping, self._rise = min(max(self.damping * factor, self._smallest), _LARGEST), 2.0

    def fail(self, outcome: Outcome) -> None:
        """Raise λ after a rejected step, faster each time."""
        self.damping, self._rise = min(self.damping * self._rise, _LARGEST), min(2 * self._rise, _LARGEST)

    def state_dict(self) -> dict[str, Any]:
        """λ and the factor of the next rejection."""
        return {"damping": self.damping, "rise": self._rise}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of :meth:`state_dict`."""
        self.damping, self._rise = float(state["damping"]), float(state["rise"])


def rounding(loss: float, eps: float) -> float:
    """Differences of two losses below this are rounding: ``10 eps |f|``."""
    return 10 * eps * abs(loss)


def reduction_ratio(loss: float, loss_after: float, predicted: float, eps: float) -> float:
    """Actual over predicted decrease; 1 where both vanish in rounding, nan where nothing was predicted.

    Args:
        loss: f at the start.
        loss_after: f at the trial point.
        predicted: ``gᵀd + ½ dᵀBd``, negative for a descent.
        eps: Machine epsilon of the parameters' dtype.
    """
    if predicted == 0:
        return math.nan
    tolerance = rounding(loss, eps)
    if abs(loss_after - loss) <= tolerance and abs(predicted) <= tolerance:
        return 1.0
    return (loss_after - loss) / predicted if predicted < 0 else math.nan


def _checked(damping: float, smallest: float) -> float:
    if not (damping > 0 and math.isfinite(damping)):
        raise ValueError(f"damping must be positive and finite, got {damping}")
    return max(float(damping), smallest)
