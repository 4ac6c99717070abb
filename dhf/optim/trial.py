"""Trial: the search along a solve's iterates for a point where the objective is lower, by the same values on every rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dhf.coordinator import Coordinator, capture
from dhf.errors import ReplicasDivergedError
from dhf.evaluation import evaluate, micro_batch_seeds
from dhf.objective import Objective
from dhf.optim.damping import rounding
from dhf.optim.line_search import armijo, backtrack
from dhf.parameters import Parameters
from dhf.solvers import Iterate

__all__ = ["Descent", "Point", "Trial"]

# replicas of a solve that differ by more than this did not merely round differently
_ROUNDING_APART = 1e-3


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """Where a step starts, and on what it is judged.

    Attributes:
        objective: What is minimised.
        parameters: What moves.
        coordinator: How ranks agree.
        shard: This rank's micro-batches.
        seed: Fixes dropout and other randomness for the step.
        theta: The parameters at the start, shape (n,).
        loss: The global objective there.
        gradient: Its global gradient there, shape (n,).
    """

    objective: Objective
    parameters: Parameters
    coordinator: Coordinator
    shard: Sequence[Any]
    seed: int
    theta: Tensor
    loss: float
    gradient: Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Descent:
    """A direction with rank 0's numbers: ``gᵀd``, and the undamped model's prediction ``gᵀd + ½dᵀBd``."""

    x: Tensor
    slope: float
    predicted: float


class Trial:
    """Objective values around one θ, the same on every rank; parameters are left where the search ended."""

    def __init__(self, point: Point, damping: float) -> None:
        self._point, self._lambda = point, damping
        self._eps = torch.finfo(point.parameters.dtype).eps
        self._seeds = micro_batch_seeds(point.seed, point.coordinator.comm.rank, len(point.shard))
        self.evaluations = 0

    def search(self, iterates: Sequence[Iterate]) -> tuple[Descent, float, float, float]:
        """The direction chosen, f at step length 1, the step length (0 if none serves), and f there."""
        at = self._point
        tolerance = rounding(at.loss, self._eps)
        descents: dict[int, Descent] = {}

        def at_iterate(i: int) -> float:
            descents[i] = self._agree_on(iterates[i])
            return self._value(descents[i].x, 1.0)

        try:
            best, f1 = backtrack(len(iterates), at_iterate)
            d = descents[best]
            length, f = 0.0, at.loss
            if d.slope < 0:
                length, f = armijo(lambda s: self._value(d.x, s), at.loss, d.slope, f1=f1, tolerance=tolerance)
        except BaseException:
            at.parameters.write(at.theta)
            raise
        at.parameters.write(at.theta if not length else torch.add(at.theta, d.x, alpha=length))
        return d, f1, length, f

    def _agree_on(self, iterate: Iterate) -> Descent:
        """Give every rank rank 0's direction and numbers."""
        at = self._point
        x = iterate.x
        gx, xx = (float(d) for d in (torch.dot(at.gradient.double(), x.double()), x.double().square().sum()))
        # CG's model is ½dᵀ(B+λI)d + gᵀd; nan where the direction is not an iterate
        predicted = iterate.model - 0.5 * self._lambda * xx
        (slope, predicted), apart = at.coordinator.synchronise(x, [gx, predicted])
        if not apart <= _ROUNDING_APART:
            raise ReplicasDivergedError(
                f"the ranks' solutions of one solve differ by {apart:.1e} relative; on like hardware they are equal: look for "
                "a rank with other code, data-dependent preconditioning, or faulty memory"
            )
        return Descent(x, slope, predicted)

    def _value(self, d: Tensor, length: float) -> float:
        at = self._point
        trial = torch.add(at.theta, d, alpha=length)
        at.parameters.write(trial)
        sums, failure = capture(lambda: evaluate(at.objective, at.parameters.device, at.shard, self._seeds))
        decay = 0.0
        if at.coordinator.comm.rank == 0 and at.objective.weight_decay:
            decay = 0.5 * at.objective.weight_decay * float(trial.double().square().sum())
        loss_sum, weight = sums or (0.0, 0.0)
        loss_sum, weight, decay = at.coordinator.reduce([loss_sum, weight, decay], failure=failure)
        self.evaluations += 1
        return loss_sum / weight + decay
