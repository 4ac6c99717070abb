"""minres and steihaug over several ranks: the same solution as one process, one collective per product, every stop agreed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dhf
from dhf.comm import Communicator
from tests.distributed.test_agreement import SEEDS, Disturbed, Watched, with_hessian
from tests.distributed.test_operator import SAMPLES, SHARDS, Poisoned, my_batches
from tests.models import dense_hessian, problem, relative_error
from tests.ranks import ranks, try_ranks

DAMPING = 0.02  # leaves the Hessian of this problem indefinite
SOLVES: dict[str, tuple[Callable[..., dhf.Solution], dict[str, Any]]] = {
    # so many iterations, since later ones differ by how rounding grows
    "minres": (dhf.minres, {"max_iterations": 12}),
    "minres to the end": (dhf.minres, {"rtol": 1e-8, "damping": 1.0}),
    "minres preconditioned": (dhf.minres, {"max_iterations": 12, "preconditioner": True}),
    "steihaug inside": (dhf.steihaug, {"rtol": 1e-8, "radius": 1e3, "damping": 1.0}),
    "steihaug boundary": (dhf.steihaug, {"rtol": 1e-8, "radius": 0.1, "damping": 1.0}),
    "steihaug curved": (dhf.steihaug, {"rtol": 1e-8, "radius": 1e2}),
    "steihaug preconditioned": (dhf.steihaug, {"rtol": 1e-8, "radius": 1e2, "preconditioner": True}),
}


def scaled(r: torch.Tensor) -> torch.Tensor:
    """A preconditioner."""
    return r / torch.linspace(1, 2, len(r), dtype=r.dtype)


def solve(comm: Communicator, name: str, shards: list[int]) -> tuple[dhf.Solution, int, torch.Tensor]:
    """A solution, the collectives that it took, and the gradient."""
    solver, options = SOLVES[name]
    options = dict(options)
    if options.pop("preconditioner", False):
        options["preconditioner"] = scaled
    objective, batch = problem("mlp", "cross_entropy", SAMPLES)
    with dhf.Hessian(objective, my_batches(comm, batch, shards, 2), comm=comm) as A:
        before = comm.collectives
        solution = solver(A.shifted(options.pop("damping", DAMPING)), -A.gradient, **options)
        return solution, comm.collectives - before, A.gradient


@pytest.mark.parametrize("shards", list(SHARDS))
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", list(SOLVES))
def test_ranks_solve_as_one_process(name: str, size: int, shards: str) -> None:
    truth, _, _ = solve(dhf.connect("serial"), name, [SAMPLES])
    first, *others = ranks(size, solve, name=name, shards=SHARDS[shards][size])
    solution, collectives, _ = first
    assert solution.reason is truth.reason
    assert solution.iterations == truth.iterations
    assert relative_error(solution.x, truth.x) < 1e-6
    assert collectives == solution.iterations + 1
    assert (solution.direction is None) == (truth.direction is None)
    for other, their_collectives, _ in others:
        assert torch.equal(other.x, solution.x)
        assert [line.model for line in other.history] == [line.model for line in solution.history]
        assert (other.reason, their_collectives) == (solution.reason, collectives)


@pytest.mark.parametrize("size", [1, 3])
def test_solutions_are_those_of_the_dense_hessian(size: int) -> None:
    objective, batch = problem("mlp", "cross_entropy", SAMPLES)
    H = dense_hessian(objective.module, batch, nn.CrossEntropyLoss())
    damped = H + torch.eye(43, dtype=torch.float64)
    for solution, _, gradient in ranks(size, solve, name="minres to the end", shards=SHARDS["uneven"][size]):
        assert solution.reason is dhf.Reason.RESIDUAL_TOLERANCE
        assert relative_error(solution.x, torch.linalg.solve(damped, -gradient)) < 1e-6
    H += DAMPING * torch.eye(43, dtype=torch.float64)
    assert float(torch.linalg.eigvalsh(H)[0]) < -1e-3
    for curved, _, _ in ranks(size, solve, name="steihaug curved", shards=SHARDS["uneven"][size]):
        assert curved.reason is dhf.Reason.TRUST_REGION_BOUNDARY
        assert float(curved.direction @ H @ curved.direction) < 0
        assert float(curved.x.norm()) == pytest.approx(1e2, rel=1e-10)


# agreement


class Rounded(Disturbed):
    """Disturbed, but no norm of zero."""

    def _disturb(self, value: float) -> float:
        return super()._disturb(value) if value else 0.0


def system(A: Any, damping: float, name: int, ulps: int) -> Watched:
    """A solve's operator, whose inner products are disturbed."""
    return Watched(A.shifted(damping), Rounded(name, ulps))


def solve_disturbed(comm: Communicator, kind: str, disturbed: list[int], at: int) -> list[tuple[dhf.Solution, int]]:
    """Disturbed solves, each taken twice: to see what the ranks compute, and with one rank's number as threshold."""
    objective, batch = problem("mlp", "cross_entropy", SAMPLES)
    damping = DAMPING if kind == "minres residual" else 1.0
    found = []
    with dhf.Hessian(objective, my_batches(comm, batch, SHARDS["even"][4], 1), comm=comm) as A:
        for seed in range(SEEDS):
            name, ulps = 1000 * seed + comm.rank, 1 if comm.rank in disturbed else 0
            if kind == "minres residual":
                seen = dhf.minres(system(A, damping, name, ulps), A.gradient, rtol=1e-12, max_iterations=at + 2)
                norm = comm.gather_objects(seen.history[at].residual_norm)[seed % comm.size]
                again = system(A, damping, name, ulps)
                solution = dhf.minres(again, A.gradient, rtol=0.0, atol=norm)
            else:
                seen = dhf.steihaug(
                    system(A, damping, name, ulps), A.gradient, radius=1e3, rtol=1e-12, max_iterations=at
                )
                length = float(Rounded(name + 7, ulps).dots((seen.x, seen.x))[0]) ** 0.5
                again = system(A, damping, name, ulps)
                radius = comm.gather_objects(length)[seed % comm.size]
                solution = dhf.steihaug(again, A.gradient, radius=radius, rtol=1e-12, max_iterations=at + 1)
            found.append((solution, again.mixed))
    return found


@pytest.mark.parametrize("disturbed", [[3], [0], [0, 1, 2, 3]], ids=["last rank", "rank 0", "all ranks"])
@pytest.mark.parametrize(
    ("kind", "at", "reason"),
    [
        ("minres residual", 2, dhf.Reason.RESIDUAL_TOLERANCE),
        ("minres residual", 6, dhf.Reason.RESIDUAL_TOLERANCE),
        ("steihaug boundary", 1, dhf.Reason.TRUST_REGION_BOUNDARY),
        ("steihaug boundary", 4, dhf.Reason.TRUST_REGION_BOUNDARY),
    ],
)
def test_all_ranks_stop_together(kind: str, at: int, reason: dhf.Reason, disturbed: list[int]) -> None:
    cases = list(zip(*ranks(4, solve_disturbed, kind=kind, disturbed=disturbed, at=at), strict=True))
    for (solution, mixed), *others in cases:
        assert solution.history[-1] == solution.history[solution.iterations]
        for other, other_mixed in others:
            assert (other.iterations, other.reason, other_mixed) == (solution.iterations, solution.reason, mixed)
            assert len(other.history) == len(solution.history)
            torch.testing.assert_close(other.x, solution.x, rtol=1e-9, atol=1e-12)
            assert other.model == pytest.approx(solution.model, rel=1e-9)
    assert any(mixed for (_, mixed), *_ in cases), "no case was close enough for the ranks to disagree"
    assert all(solution.reason is reason for (solution, _), *_ in cases)


def solve_disturbed_at_the_least_curvature(comm: Communicator, disturbed: list[int]) -> list[tuple[dhf.Solution, int]]:
    """Solves in which pᵀAp is 10 ε ‖p‖ ‖A p‖ in the first iteration, up to a few units in the last place."""
    objective, batch = with_hessian(torch.tensor([1.0, -(1.0 - 20 * 2.0**-52)], dtype=torch.float64))
    found = []
    with dhf.Hessian(objective, [batch], comm=comm) as A:
        for seed in range(SEEDS):
            disturbing = system(A, 0.0, 1000 * seed + comm.rank, 32 if comm.rank in disturbed else 0)
            solution = dhf.steihaug(disturbing, torch.ones(2, dtype=torch.float64), radius=3.0)
            found.append((solution, disturbing.mixed))
    return found


@pytest.mark.parametrize("disturbed", [[3], [0], [0, 1, 2, 3]], ids=["last rank", "rank 0", "all ranks"])
def test_all_ranks_tell_of_the_same_direction(disturbed: list[int]) -> None:
    cases = list(zip(*ranks(4, solve_disturbed_at_the_least_curvature, disturbed=disturbed), strict=True))
    for (solution, mixed), *others in cases:
        assert solution.reason is dhf.Reason.TRUST_REGION_BOUNDARY
        for other, other_mixed in others:
            assert (other.reason, other.iterations, other_mixed) == (solution.reason, 1, mixed)
            assert (other.direction is None) == (solution.direction is None)
            torch.testing.assert_close(other.x, solution.x)
    assert any(mixed for (_, mixed), *_ in cases), "no case was close enough for the ranks to disagree"
    if 0 in disturbed:
        assert len({solution.direction is None for (solution, _), *_ in cases}) == 2


# failures


def broken(comm: Communicator, solver: str) -> dhf.Solution:
    """A solve with NaN in the products of rank 1."""
    torch.manual_seed(0)
    objective = dhf.Objective(Poisoned(comm.rank == 1).double(), nn.MSELoss())
    batch = torch.ones(2, 4, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    with dhf.Hessian(objective, [batch], comm=comm) as A:
        if solver == "minres":
            return dhf.minres(A, A.gradient)
        return dhf.steihaug(A, A.gradient, radius=1.0)


@pytest.mark.parametrize("solver", ["minres", "steihaug"])
def test_nan_on_one_rank_ends_all(solver: str) -> None:
    for solution in ranks(3, broken, solver=solver):
        assert (solution.reason, solution.iterations) == (dhf.Reason.NON_FINITE, 0)
        assert not solution.x.any()


def raising(comm: Communicator, solver: str) -> None:
    """A solve whose preconditioner raises on rank 2, at its third call."""
    objective, batch = problem("mlp", "cross_entropy", SAMPLES)
    calls = 0

    def M(r: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if comm.rank == 2 and calls == 3:
            raise LookupError("no such block")
        return r

    with dhf.Hessian(objective, my_batches(comm, batch, SHARDS["empty"][3], 1), comm=comm) as A:
        if solver == "minres":
            dhf.minres(A.shifted(1.0), A.gradient, rtol=1e-12, preconditioner=M)
        else:
            dhf.steihaug(A.shifted(1.0), A.gradient, radius=1e3, rtol=1e-12, preconditioner=M)


@pytest.mark.parametrize("solver", ["minres", "steihaug"])
def test_what_a_preconditioner_raises_on_one_rank_reaches_all(solver: str) -> None:
    for outcome in try_ranks(3, raising, solver=solver):
        assert (outcome.type, outcome.rank) == ("RankError", 2)
        assert "LookupError: no such block" in outcome.text
