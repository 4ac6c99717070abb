"""Trial: the search from a solve for a point where the objective is lower, by the same values on every rank."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from dhf.coordinator import Coordinator
from dhf.errors import ReplicasDivergedError
from dhf.objective import Objective
from dhf.operator import loss_at
from dhf.optim.damping import reduction_ratio, rounding
from dhf.optim.line_search import armijo, backtrack, logarithmic_grid
from dhf.parameters import Parameters
from dhf.solvers import Iterate
from dhf.vector_space import VectorSpace

__all__ = ["Point", "Trial", "Tried"]

T = TypeVar("T")

# replicas of a solve that differ by more than this did not merely round differently
_ROUNDING_APART = 1e-3
_GOOD_RATIO = 0.75  # from which on the last iterate is taken without a look at those before it
_LEAST_RATIO = 1e-4  # of a step that is taken whole


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
        gradient: Its global gradient there, as vectors are stored.
        space: How they are.
    """

    objective: Objective
    parameters: Parameters
    coordinator: Coordinator
    shard: Sequence[Any]
    seed: int
    theta: Tensor
    loss: float
    gradient: Tensor
    space: VectorSpace


@dataclasses.dataclass(frozen=True, slots=True)
class Tried:
    """A direction, judged by the objective.

    Attributes:
        x: The direction, whole, shape (n,).
        norm: Its Euclidean norm.
        ratio: Actual over predicted decrease of the whole step; nan without a prediction.
        length: The factor on x that was taken; 0 where the parameters were left alone.
        loss: f where the parameters are now.
    """

    x: Tensor
    norm: float
    ratio: float
    length: float
    loss: float


@dataclasses.dataclass(frozen=True, slots=True)
class _Descent:
    """A direction with rank 0's numbers: ``gᵀd``, ``dᵀd`` and the undamped model's prediction ``gᵀd + ½dᵀBd``."""

    x: Tensor
    slope: float
    square: float
    predicted: float


class Trial:
    """Objective values around one θ, the same on every rank; parameters are left where the trial ended."""

    def __init__(self, point: Point) -> None:
        self._point = point
        self._eps = torch.finfo(point.parameters.dtype).eps
        self._tolerance = rounding(point.loss, self._eps)
        self.evaluations = 0

    def whole(self, iterate: Iterate, damping: float) -> Tried:
        """Take the step as it is if the objective falls by more than a trace of what the model predicts; else stay."""

        def judge() -> tuple[_Descent, float, float, float]:
            d = self._agree_on(iterate, damping)
            f1 = self._value(d.x, 1.0)
            ratio = reduction_ratio(self._point.loss, f1, d.predicted, self._eps)
            good = ratio > _LEAST_RATIO and math.isfinite(f1) and d.slope < 0
            return d, f1, float(good), f1 if good else self._point.loss

        return self._end(*self._from_start(judge))

    def search(self, iterates: Sequence[Iterate], damping: float, line_search: str = "armijo") -> Tried:
        """Choose among iterates from the last one down, then the step's length."""

        def judge() -> tuple[_Descent, float, float, float]:
            at = self._point
            descents: dict[int, _Descent] = {}

            def at_iterate(i: int) -> float:
                descents[i] = self._agree_on(iterates[i], damping)
                return self._value(descents[i].x, 1.0)

            def as_predicted(f: float) -> bool:
                last = descents[len(iterates) - 1]
                return reduction_ratio(at.loss, f, last.predicted, self._eps) > _GOOD_RATIO

            best, f1 = backtrack(len(iterates), at_iterate, satisfied=as_predicted)
            d = descents[best]
            if not d.slope < 0:
                return d, f1, 0.0, at.loss
            value = functools.partial(self._value, d.x)
            if line_search == "grid":
                return d, f1, *logarithmic_grid(value, at.loss, f1)
            # a step that is all rounding, in what it promises too, may raise the objective by rounding
            slack = self._tolerance if abs(d.slope) <= self._tolerance else 0.0
            return d, f1, *armijo(value, at.loss, d.slope, f1=f1, tolerance=self._tolerance, slack=slack)

        return self._end(*self._from_start(judge))

    def _from_start(self, judge: Callable[[], T]) -> T:
        """What the judge says; the parameters stand at the start again, also where it fails."""
        try:
            return judge()
        finally:
            self._point.parameters.write(self._point.theta)

    def _end(self, d: _Descent, f1: float, length: float, f: float) -> Tried:
        at = self._point
        if length:
            at.parameters.write(torch.add(at.theta, d.x, alpha=length))
        ratio = reduction_ratio(at.loss, f1, d.predicted, self._eps)
        return Tried(d.x, math.sqrt(d.square), ratio, length, f)

    def _agree_on(self, iterate: Iterate, damping: float) -> _Descent:
        """Give every rank rank 0's direction and numbers."""
        at = self._point
        gx, xx = at.space.dots((at.gradient, iterate.x), (iterate.x, iterate.x))
        x = at.space.whole(iterate.x)
        # CG's model is ½dᵀ(B+λI)d + gᵀd; nan where the direction is not an iterate
        predicted = iterate.model - 0.5 * damping * xx
        (slope, square, predicted), apart = at.coordinator.synchronise(x, [gx, xx, predicted])
        if not apart <= _ROUNDING_APART:
            raise ReplicasDivergedError(
                f"the ranks' solutions of one solve differ by {apart:.1e} relative; on like hardware they are equal: look for "
                "a rank with other code, data-dependent preconditioning, or faulty memory"
            )
        return _Descent(x, slope, square, predicted)

    def _value(self, d: Tensor, length: float) -> float:
        at = self._point
        trial = torch.add(at.theta, d, alpha=length)
        at.parameters.write(trial)
        value = loss_at(trial, at.objective, at.shard, at.coordinator, seed=at.seed)
        self.evaluations += 1
        return value
