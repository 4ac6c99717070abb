"""TrustRegion: the radius within which the quadratic model is minimised, steered by how well it predicted."""

from __future__ import annotations

import math
from typing import Any

from dhf.optim.outcome import Outcome
from dhf.reason import Reason

__all__ = ["TrustRegion"]

_LARGEST = 1e6


class TrustRegion:
    """The radius shrinks to a quarter of a step that was predicted badly, and doubles after a good one that it cut short.

    Args:
        radius: The first radius, in the norm of the solve (the preconditioner's, where there is one).

    Source: Nocedal & Wright, "Numerical Optimization" (2006), algorithm 4.1.
    """

    full_step = True

    def __init__(self, radius: float = 1.0) -> None:
        if not (radius > 0 and math.isfinite(radius)):
            raise ValueError(f"radius must be positive and finite, got {radius}")
        self.damping = 0.0
        self.radius: float | None = float(radius)

    def accept(self, outcome: Outcome) -> None:
        """Follow an accepted step."""
        assert self.radius is not None
        if outcome.ratio < 0.25:
            self.radius *= 0.25
        elif outcome.ratio > 0.75 and outcome.solve_reason is Reason.TRUST_REGION_BOUNDARY:
            self.radius = min(2 * self.radius, _LARGEST)

    def fail(self, outcome: Outcome) -> None:
        """Shrink the region after a rejected step."""
        assert self.radius is not None
        self.radius *= 0.25

    def state_dict(self) -> dict[str, Any]:
        """The radius."""
        return {"radius": self.radius}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of :meth:`state_dict`."""
        self.radius = float(state["radius"])
