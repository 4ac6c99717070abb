"""LevenbergMarquardt: the damping λ of ``(B + λI) d = -g``, steered by how well the quadratic model predicted."""

from __future__ import annotations

import math

__all__ = ["LevenbergMarquardt", "reduction_ratio", "rounding"]

_SMALLEST, _LARGEST = 1e-12, 1e12


class LevenbergMarquardt:
    """λ falls when the model predicts well, rises when it does not.

    Args:
        damping: The first λ, in the units of the curvature.
        decrease: Factor on λ when the reduction ratio is above 3/4.
        increase: Factor on λ when it is below 1/4.
        failure: Factor on λ when a step found no decrease at all.

    Source: Martens (2010), section 4.1, with his 2/3 and 3/2 as defaults.
    """

    def __init__(
        self, damping: float, *, decrease: float = 2 / 3, increase: float = 3 / 2, failure: float = 4.0
    ) -> None:
        if not (damping > 0 and math.isfinite(damping)):
            raise ValueError(f"damping must be positive and finite, got {damping}")
        self.damping = float(damping)
        self._decrease, self._increase, self._failure = decrease, increase, failure

    def update(self, ratio: float) -> None:
        """Follow the reduction ratio of an accepted step; nan leaves λ alone."""
        if ratio > 0.75:
            self.damping = max(self.damping * self._decrease, _SMALLEST)
        elif ratio < 0.25:
            self.damping = min(self.damping * self._increase, _LARGEST)

    def fail(self) -> None:
        """Raise λ after a step that found no decrease."""
        self.damping = min(self.damping * self._failure, _LARGEST)


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
