"""Outcome: what a step's judge tells whoever steers the next one; and the seam between them."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from dhf.reason import Reason

__all__ = ["Outcome", "Steering"]


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """A step, judged.

    Attributes:
        ratio: Actual over predicted decrease of the whole step; nan without a prediction.
        solve_reason: Why its solve ended.
        norm: Euclidean norm of the whole step.
    """

    ratio: float
    solve_reason: Reason
    norm: float


class Steering(Protocol):
    """What keeps steps within the reach of the quadratic model: a damping or a radius, adapted from step to step.

    Attributes:
        damping: λ of the next solve.
        radius: Of the next solve's trust region, or None where damping alone bounds it.
        full_step: Whether a step is taken whole or not at all; otherwise its length is searched.
    """

    damping: float
    radius: float | None
    full_step: bool

    def accept(self, outcome: Outcome) -> None:
        """Follow a step that was taken."""

    def fail(self, outcome: Outcome) -> None:
        """Follow a step that was not."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of :meth:`state_dict`."""
