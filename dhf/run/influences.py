"""score_queries: what training samples do to the loss on chosen samples, at a problem's point."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import numpy as np
import torch

from dhf.coordinator import Coordinator
from dhf.errors import UsageError
from dhf.evaluation import evaluate
from dhf.influence_functions import influence
from dhf.optim import HessianFree
from dhf.optim.choices import make_preconditioner
from dhf.parameters import Parameters
from dhf.problems import Shard
from dhf.problems.data import some_of
from dhf.run.point import Point
from dhf.run.solving import patterns
from dhf.solvers import Solution

__all__ = ["RTOL", "Asked", "Scores", "numbers_in", "score_queries"]

RTOL = {torch.float64: 1e-6, torch.float32: 1e-4}  # what solves on ill-conditioned matrices reach


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """What is scored, and how.

    Attributes:
        held_out: Whether queries are held-out samples, or training samples.
        queries: Their numbers there.
        curvature: ``"ggn"`` or ``"hessian"``.
        damping: Added to its diagonal.
        parameters: Patterns of the names that the matrix is taken in, or None for all.
        rtol: Of each solve.
        max_iterations: Of each solve, or None.
    """

    held_out: bool
    queries: list[int]
    curvature: str
    damping: float
    parameters: str | None
    rtol: float
    max_iterations: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class Scores:
    """What was found; the same on every rank.

    Attributes:
        queries: The samples asked for.
        losses: Their losses, weight decay left out.
        scores: Shape (queries, training samples), float64, in the units of the loss: the rise of the query's loss, to first
            order, were the training sample left out. Positive for samples that help, negative for those that harm.
        solutions: The solve for each query.
    """

    queries: list[int]
    losses: list[float]
    scores: np.ndarray
    solutions: list[Solution]

    @property
    def converged(self) -> bool:
        """Whether all solves did."""
        return all(solution.converged for solution in self.solutions)

    def top(self, query: int, number: int) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """The most helpful and the most harmful training samples for the query of this place, the strongest first."""
        row = self.scores[query]
        order = np.argsort(-row, kind="stable")
        helpful = [(int(i), float(row[i])) for i in order[:number] if row[i] > 0]
        harmful = [(int(i), float(row[i])) for i in order[::-1][:number] if row[i] < 0]
        return helpful, harmful


def numbers_in(text: str, samples: int) -> list[int]:
    """The numbers of samples in a list such as ``0,5,10-14``.

    Raises:
        UsageError: If it is no such list, or there are no such samples.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise UsageError(f"--queries must be numbers of samples such as 0,5,10-14, got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UsageError(f"--queries {part.strip()} counts down; give {last}-{first}")
        if last >= samples:
            raise UsageError(f"--queries {part.strip()}: there are {samples:,} samples, 0 to {samples - 1}")
        found += range(first, last + 1)
    return found


def score_queries(point: Point, asked: Asked, coordinator: Coordinator) -> Scores:
    """Score all training samples, over all ranks together.

    Raises:
        UsageError: If a setting does not go with the problem.
    """
    objective, config, comm = point.objective, point.config, coordinator.comm
    optimizer = point.parts.optimizer
    assert isinstance(optimizer, HessianFree)
    data = point.parts.problem.validation if asked.held_out else point.parts.problem.train
    dtype = Parameters(objective.module).dtype
    shard = functools.partial(Shard, device=comm.device, dtype=dtype, micro_batch_size=1, seed=config.seed)
    queries = coordinator.attempt(lambda: shard(some_of(data, asked.queries), 0, 1).batches(0))
    batches = coordinator.attempt(lambda: point.train.batches(0))
    found = influence(
        objective,
        batches,
        queries,
        curvature=asked.curvature,
        damping=asked.damping,
        rtol=asked.rtol,
        max_iterations=asked.max_iterations,
        preconditioner=make_preconditioner(optimizer.settings, config.seed),
        coordinator=coordinator,
        seed=config.seed,
        retain="auto" if config.retain is None else config.retain,
        products=config.products or "auto",
        parameters=patterns(asked.parameters),
    )
    scores = np.concatenate(comm.gather_objects(found.scores.numpy()), axis=1)
    losses = coordinator.attempt(lambda: [_loss(point, batch) for batch in queries])
    return Scores(asked.queries, losses, scores, found.solutions)


def _loss(point: Point, batch: Any) -> float:
    total, count = evaluate(point.objective, Parameters(point.objective.module).device, [batch], [point.config.seed])
    return total / count if count else 0.0
