"""Ranks whose inner products round differently still stop at the same iteration, for the same reason.

Every threshold is set to a number that occurs on one of the ranks, so that the ranks fall on both sides of it; the solver
must then find out, follow rank 0, and take the mixed product again.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dhf
from dhf.comm import Communicator
from dhf.operator import Shifted
from dhf.vector_space import Replicated
from tests.models import problem
from tests.ranks import ranks

SEEDS = 12


class Disturbed(Replicated):
    """Inner products that are off by up to some units in the last place, differently on every rank."""

    def __init__(self, seed: int, ulps: int) -> None:
        super().__init__()
        self._random, self._ulps = random.Random(seed), ulps

    def dots(self, *pairs: tuple[Tensor, Tensor]) -> list[float]:
        return [self._disturb(value) for value in super().dots(*pairs)]

    def _disturb(self, value: float) -> float:
        return value + self._random.randint(-self._ulps, self._ulps) * float(np.spacing(value))


class Watched:
    """Counts the products that were taken of different vectors on different ranks."""

    def __init__(self, system: Shifted, space: Replicated) -> None:
        self._system, self.space, self.mixed = system, space, 0

    def apply(self, v: Tensor, *agreement: Any) -> tuple[Tensor, Any]:
        product, verdict = self._system.apply(v, *agreement)
        self.mixed += not verdict.valid
        return product, verdict


class Quadratic(nn.Module):
    """Outputs w for every sample."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(n, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x), -1)


def with_hessian(diagonal: Tensor) -> tuple[dhf.Objective, Any]:
    """An objective whose Hessian is this diagonal, to the last bit."""
    objective = dhf.Objective(Quadratic(len(diagonal)), lambda z, batch: (0.5 * diagonal * z * z).sum(1).mean())
    return objective, (torch.zeros(1, 1), None)


def solve_disturbed(comm: Communicator, kind: str, disturbed: list[int], at: int = 0) -> list[tuple[dhf.Solution, int]]:
    """Disturbed solves, each taken twice: to see what the ranks compute, and with one rank's number as threshold."""
    if kind == "curvature":
        # pᵀAp is 10 ε ‖p‖ ‖Ap‖ in the first iteration, up to a few units in the last place
        objective, batch = with_hessian(torch.tensor([1.0, -(1.0 - 20 * 2.0**-52)], dtype=torch.float64))
        curvature, b, shift, ulps = dhf.Hessian, torch.ones(2, dtype=torch.float64), 0.0, 32
    else:
        objective, batch = problem("mlp", "mse")
        curvature, b, shift, ulps = dhf.GaussNewton, None, 1e-3, 1
    found = []
    with curvature(objective, [batch], comm=comm) as A:
        b = A.gradient if b is None else b
        for seed in range(SEEDS):

            def system(name: int = 1000 * seed + comm.rank) -> Watched:
                return Watched(A.shifted(shift), Disturbed(name, ulps if comm.rank in disturbed else 0))

            seen = comm.gather_objects(dhf.cg(system(), b, rtol=1e-12, max_iterations=at + 2).history)
            again = system()
            solution = dhf.cg(again, b, **thresholds(seen[seed % comm.size], kind, at))
            found.append((solution, again.mixed))
    return found


def thresholds(history: list[Any], kind: str, at: int) -> dict[str, float]:
    """Stopping rules that a solve of this history meets at iteration ``at`` with nothing to spare."""
    if kind == "residual":
        return {"rtol": 0.0, "atol": history[at].residual_norm}
    if kind == "progress":
        now, before = history[at].model, history[at - 10].model
        return {"rtol": 0.0, "progress_tolerance": (now - before) / now / 10, "max_iterations": at + 2}
    return {"max_iterations": 2}


@pytest.mark.parametrize("disturbed", [[3], [0], [0, 1, 2, 3]], ids=["last rank", "rank 0", "all ranks"])
@pytest.mark.parametrize(
    ("kind", "at", "reason"),
    [
        ("residual", 1, dhf.Reason.RESIDUAL_TOLERANCE),
        ("residual", 3, dhf.Reason.RESIDUAL_TOLERANCE),
        ("residual", 8, dhf.Reason.RESIDUAL_TOLERANCE),
        ("progress", 12, dhf.Reason.RELATIVE_PROGRESS),
        ("curvature", 0, dhf.Reason.NEGATIVE_CURVATURE),
    ],
)
def test_all_ranks_stop_together(kind: str, at: int, reason: dhf.Reason, disturbed: list[int]) -> None:
    cases = list(zip(*ranks(4, solve_disturbed, kind=kind, disturbed=disturbed, at=at), strict=True))
    for (solution, mixed), *others in cases:
        for other, other_mixed in others:
            assert (other.iterations, other.reason, other_mixed) == (solution.iterations, solution.reason, mixed)
            assert len(other.history) == len(solution.history)
            torch.testing.assert_close(other.x, solution.x, rtol=1e-9, atol=0)
            assert (other.direction is None) == (solution.direction is None)
            if solution.direction is not None:
                torch.testing.assert_close(other.direction, solution.direction, rtol=1e-9, atol=0)
    assert any(mixed for (_, mixed), *_ in cases), "no case was close enough for the ranks to disagree"
    assert any(solution.reason is reason for (solution, _), *_ in cases)


def test_rank_0_decides_both_ways() -> None:
    cases = ranks(4, solve_disturbed, kind="residual", disturbed=[0, 1, 2, 3], at=3)[0]
    assert {solution.iterations for solution, mixed in cases if mixed} >= {3, 4}


@pytest.mark.parametrize("kind", ["residual", "curvature"])
def test_ranks_that_round_alike_take_no_product_twice(kind: str) -> None:
    for found in ranks(4, solve_disturbed, kind=kind, disturbed=[], at=3):
        assert all(mixed == 0 for _, mixed in found)


def without_thresholds(comm: Communicator) -> list[tuple[int, dhf.Reason]]:
    """Solves to tolerances that no residual is close to."""
    objective, batch = problem("mlp", "mse")
    found = []
    with dhf.GaussNewton(objective, [batch], comm=comm) as A:
        for seed in range(SEEDS):
            A.space = Disturbed(1000 * seed + comm.rank, 1)
            rtol = 10.0 ** -random.Random(seed).uniform(1, 9)
            solution = dhf.cg(A.shifted(1e-2), A.gradient, rtol=rtol)
            found.append((solution.iterations, solution.reason))
    return found


def test_all_ranks_stop_together_at_any_tolerance() -> None:
    first, *others = ranks(4, without_thresholds)
    assert all(other == first for other in others)
    assert len({iterations for iterations, _ in first}) > 3
