"""cgls and direct over several ranks: the steps of one process and of numpy's lstsq, and what they cost."""

from __future__ import annotations

import functools
import itertools
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dhf
from dhf.comm import Communicator
from dhf.curvature import GradientGraph
from dhf.operator import NormalMatrix, ResidualJacobian
from dhf.solvers import Direct, Solution, cgls
from tests.distributed.test_agreement import Disturbed
from tests.distributed.test_operator import SAMPLES, SHARDS, my_batches
from tests.models import LOSSES, dense_gauss_newton, dense_jacobian, flat, module_outputs, problem, relative_error
from tests.ranks import ranks, try_ranks

DAMPING = 1e-2


def objective_of(kind: str, decay: float) -> tuple[dhf.Objective, Any]:
    objective, batch = problem("mlp", "mse" if kind == "least squares" else kind, SAMPLES, weight_decay=decay)
    if kind == "least squares":
        return dhf.LeastSquares(objective.module, weight_decay=decay), batch
    return objective, batch


@functools.cache
def truth(kind: str, decay: float) -> Tensor:
    """The damped step, from dense matrices."""
    objective, (x, y) = objective_of(kind, decay)
    theta = flat(objective.module.parameters())
    if kind in ("mse", "least squares"):
        z, J = module_outputs(objective.module, x), dense_jacobian(objective.module, x)
        scale = math.sqrt(2 / z.numel()) if kind == "mse" else 1 / math.sqrt(SAMPLES)
        r = scale * (z - y if kind == "mse" else z).flatten()
        roots = math.sqrt(decay), math.sqrt(DAMPING)
        stacked = np.vstack([scale * J.numpy(), roots[0] * np.eye(43), roots[1] * np.eye(43)])
        right = np.concatenate([-r.numpy(), -roots[0] * theta.numpy(), np.zeros(43)])
        return torch.from_numpy(np.linalg.lstsq(stacked, right, rcond=None)[0])
    loss = LOSSES[kind][1](objective.module(x), y)
    gradient = flat(torch.autograd.grad(loss, list(objective.module.parameters()))) + decay * theta
    G = dense_gauss_newton(objective.module, (x, y), LOSSES[kind][1], decay)
    return torch.linalg.solve(G + DAMPING * torch.eye(43).double(), -gradient)


def assert_alike(solutions: list[Solution]) -> None:
    """Every rank has the bits of the first."""
    first, *others = solutions
    for other in others:
        assert torch.equal(other.x, first.x)
        assert (other.reason, other.iterations, other.model, other.true_residual_norm) == (
            first.reason,
            first.iterations,
            first.model,
            first.true_residual_norm,
        )


# cgls


class Counted(ResidualJacobian):
    """Counts the residuals that a solver asks for."""

    residuals = 0

    def residual(self, *arguments: Any) -> Any:
        self.residuals += 1
        return super().residual(*arguments)


def solve_by_rows(
    comm: Communicator, kind: str, decay: float, shards: list[int], micro_batches: int
) -> tuple[Solution, Tensor, int, int]:
    objective, batch = objective_of(kind, decay)
    with Counted(objective, my_batches(comm, batch, shards, micro_batches), comm=comm) as A:
        v = torch.randn(43, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        product = A.apply(v)[0].clone()
        numbers = torch.cat([product, A.residual(v)[0], torch.tensor([A.squared, A.loss]).double()])
        before, A.residuals = comm.collectives, 0
        solution = cgls(A, damping=DAMPING, rtol=1e-10)
        return solution, numbers, comm.collectives - before, A.residuals


@functools.cache
def serial_by_rows(kind: str, decay: float) -> tuple[Solution, Tensor, int, int]:
    return solve_by_rows(dhf.connect("serial"), kind, decay, [SAMPLES], 1)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(("size", "shards"), [(1, "even"), *itertools.product((2, 3, 4), SHARDS)])
@pytest.mark.parametrize(("kind", "decay"), [("mse", 0.0), ("least squares", 0.05)])
def test_cgls_on_ranks(kind: str, decay: float, size: int, shards: str, micro_batches: int) -> None:
    alone, numbers, _, _ = serial_by_rows(kind, decay)
    found = ranks(size, solve_by_rows, kind=kind, decay=decay, shards=SHARDS[shards][size], micro_batches=micro_batches)
    assert_alike([solution for solution, *_ in found])
    for solution, mine, collectives, residuals in found:
        assert relative_error(mine, numbers) < 1e-12
        assert torch.equal(mine, found[0][1])
        assert solution.reason is dhf.Reason.RESIDUAL_TOLERANCE
        assert abs(solution.iterations - alone.iterations) <= 2  # rounding moves the end of an undamped solve
        assert relative_error(solution.x, truth(kind, decay)) < 1e-7
        # one per iteration, one per residual; a residual at the end, and one each time it has fallen a hundredfold
        assert collectives == solution.iterations + residuals
        fall = min(line.residual_norm for line in solution.history) / solution.history[0].residual_norm
        assert 2 <= residuals <= 1 + math.log(1 / fall, 100)


def solve_disturbed(comm: Communicator, disturbed: list[int], at: int) -> list[tuple[Solution, int, int]]:
    """Solves in which the ranks' inner products round differently just where the residual is to be replaced."""
    module = sys.modules["dhf.solvers.cgls"]
    objective, batch = objective_of("mse", 0.0)
    usual, found = module._REPLACE, []
    with Counted(objective, my_batches(comm, batch, SHARDS["uneven"][4], 1), comm=comm) as A:
        try:
            for seed in range(12):

                def disturb(seed: int = seed) -> None:
                    A.space = Disturbed(1000 * seed + comm.rank, 1 if comm.rank in disturbed else 0)

                disturb()
                module._REPLACE = usual
                seen = comm.gather_objects(cgls(A, damping=DAMPING, rtol=1e-12, max_iterations=at).history)
                history = seen[seed % comm.size]
                module._REPLACE = history[at].residual_norm / history[0].residual_norm * (1 + 2.0**-52)
                disturb()
                before, A.residuals, products = comm.collectives, 0, A.products
                solution = cgls(A, damping=DAMPING, rtol=1e-10, max_iterations=at + 3)
                assert comm.collectives - before == A.products - products
                found.append((solution, A.residuals, A.products - products))
        finally:
            module._REPLACE = usual
    return found


@pytest.mark.parametrize("disturbed", [[3], [0], [0, 1, 2, 3]], ids=["last rank", "rank 0", "all ranks"])
def test_all_ranks_replace_the_residual_together(disturbed: list[int]) -> None:
    cases = list(zip(*ranks(4, solve_disturbed, disturbed=disturbed, at=3), strict=True))
    for (solution, _, products), *others in cases:
        assert (solution.reason, solution.iterations) == (dhf.Reason.ITERATION_LIMIT, 6)
        assert solution.true_residual_norm == pytest.approx(solution.residual_norm, rel=1e-9)
        for other, _, theirs in others:
            assert (other.reason, other.iterations, theirs) == (solution.reason, solution.iterations, products)
            torch.testing.assert_close(other.x, solution.x, rtol=1e-9, atol=1e-12)
    asked = [[residuals for _, residuals, _ in case] for case in cases]
    assert any(len(set(residuals)) > 1 for residuals in asked), "no case in which the ranks disagreed"


def refused(comm: Communicator) -> None:
    objective, batch = problem("mlp", "cross_entropy")
    ResidualJacobian(objective, [batch], comm=comm)


def test_other_losses_are_refused_on_every_rank() -> None:
    for outcome in try_ranks(3, refused):
        assert outcome.type == "UsageError"
        assert "cgls needs a sum of squares" in outcome.text


# direct


def solve_dense(
    comm: Communicator, kind: str, decay: float, in_samples: bool, shards: list[int], micro_batches: int
) -> tuple[Solution, Tensor, int]:
    objective, batch = objective_of(kind, decay)
    batches = my_batches(comm, batch, shards, micro_batches)
    with dhf.GlobalOperator(objective, batches, comm=comm, build=GradientGraph) as operator:
        before = comm.collectives
        normal = NormalMatrix(operator, in_samples=in_samples)
        system = Direct(normal)
        system.solve(10 * DAMPING)
        return system.solve(DAMPING), normal.matrix, comm.collectives - before


@functools.cache
def serial_matrix(kind: str, in_samples: bool) -> Tensor:
    return solve_dense(dhf.connect("serial"), kind, 0.0, in_samples, [SAMPLES], 1)[1]


GRID = list(itertools.product([(1, "even"), *itertools.product((2, 3, 4), SHARDS)], (1, 3)))


@pytest.mark.parametrize(
    ("kind", "in_samples", "decay", "layout"),
    [
        *[("mse", True, 0.05, layout) for layout in GRID],
        *[("cross_entropy", False, 0.05, layout) for layout in GRID],
        *[("mse", False, 0.0, layout) for layout in GRID[-3:]],
        *[("least squares", True, 0.0, layout) for layout in GRID[-3:]],
        *[("bce", False, 0.0, layout) for layout in GRID[-3:]],
    ],
)
def test_direct_on_ranks(kind: str, in_samples: bool, decay: float, layout: tuple[tuple[int, str], int]) -> None:
    (size, shards), micro_batches = layout
    found = ranks(
        size,
        solve_dense,
        kind=kind,
        decay=decay,
        in_samples=in_samples,
        shards=SHARDS[shards][size],
        micro_batches=micro_batches,
    )
    assert_alike([solution for solution, *_ in found])
    for solution, matrix, collectives in found:
        assert relative_error(matrix, serial_matrix(kind, in_samples)) < 1e-12
        assert torch.equal(matrix, found[0][1])
        assert solution.reason is dhf.Reason.RESIDUAL_TOLERANCE
        assert relative_error(solution.x, truth(kind, decay)) < 1e-8
        assert collectives == (2 if in_samples else 1)


def ignored(comm: Communicator, shards: list[int]) -> Tensor:
    objective, (x, y) = problem("mlp", "cross_entropy", SAMPLES)
    y[:4] = -100
    with dhf.GlobalOperator(objective, my_batches(comm, (x, y), shards, 2), comm=comm, build=GradientGraph) as operator:
        return NormalMatrix(operator, in_samples=False).matrix


def test_ignored_samples_count_nothing_on_any_rank() -> None:
    objective, (x, y) = problem("mlp", "cross_entropy", SAMPLES)
    G = dense_gauss_newton(objective.module, (x[4:], y[4:]), LOSSES["cross_entropy"][1])
    for matrix in ranks(3, ignored, shards=[3, 5, 4]):
        assert relative_error(matrix, G) < 1e-11


class Loses(nn.Linear):
    """A layer that on one rank vmap cannot enter."""

    def __init__(self, loses: bool) -> None:
        super().__init__(4, 3)
        self.loses = loses

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return z * float(z.detach().abs().max().item() > -1) if self.loses else z


def lost(comm: Communicator, in_samples: bool) -> None:
    torch.manual_seed(0)
    objective = dhf.Objective(Loses(comm.rank == 1).double(), nn.MSELoss())
    batch = torch.ones(2, 4, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    with dhf.GlobalOperator(objective, [batch], comm=comm, build=GradientGraph) as operator:
        NormalMatrix(operator, in_samples=in_samples)


@pytest.mark.parametrize("in_samples", [False, True])
def test_what_one_rank_cannot_differentiate_is_told_by_all(in_samples: bool) -> None:
    for outcome in try_ranks(3, lost, in_samples=in_samples):
        assert outcome.type == "PerSampleError"
        assert outcome.text.startswith("rank 1: outputs cannot be differentiated sample by sample")


def without_hessian(comm: Communicator) -> None:
    objective, batch = problem("mlp", "mse")
    objective = dhf.Objective(objective.module, nn.SmoothL1Loss())
    batches = [batch] if comm.rank else []
    with dhf.GlobalOperator(objective, batches, comm=comm, build=GradientGraph) as operator:
        NormalMatrix(operator, in_samples=False)


def test_a_loss_without_a_known_hessian_is_told_by_all_even_without_samples() -> None:
    for outcome in try_ranks(3, without_hessian):
        assert outcome.type == "UsageError"
        assert "direct needs a loss with a known output Hessian" in outcome.text
