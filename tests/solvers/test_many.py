"""solve_many: every column is solved as it would be alone."""

from __future__ import annotations

import pytest
import torch

import dhf
from tests.models import LOSSES, dense_gauss_newton, problem, relative_error


@pytest.mark.parametrize("solver", [dhf.cg, dhf.minres])
def test_columns_are_solutions_of_the_dense_system(solver: object) -> None:
    objective, batch = problem("mlp", "mse")
    G = dense_gauss_newton(objective.module, batch, LOSSES["mse"][1]) + torch.eye(43).double()
    B = torch.randn(43, 4, dtype=torch.float64)
    B[:, 2] = 0
    with dhf.GaussNewton(objective, [batch]) as A:
        solutions = dhf.solve_many(A.shifted(1.0), B, solver=solver, rtol=1e-10)
        alone = solver(A.shifted(1.0), B[:, 1].contiguous(), rtol=1e-10)
    assert relative_error(torch.stack([s.x for s in solutions], 1), torch.linalg.solve(G, B)) < 1e-8
    assert [s.reason.name for s in solutions] == [
        "RESIDUAL_TOLERANCE",
        "RESIDUAL_TOLERANCE",
        "ZERO_RIGHT_HAND_SIDE",
        "RESIDUAL_TOLERANCE",
    ]
    assert torch.equal(solutions[1].x, alone.x)
    assert solutions[1].true_residual_norm == alone.true_residual_norm


def test_a_column_that_fails_leaves_the_others_alone() -> None:
    A = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    first, second = dhf.solve_many(A, torch.eye(2, dtype=torch.float64))
    assert first.reason is dhf.Reason.RESIDUAL_TOLERANCE
    assert second.reason is dhf.Reason.NEGATIVE_CURVATURE


def test_starts_are_taken_by_columns() -> None:
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    B = torch.randn(3, 2, dtype=torch.float64)
    solutions = dhf.solve_many(A, B, X0=torch.linalg.solve(A, B))
    assert [s.iterations for s in solutions] == [0, 0]


def test_wrong_shapes_are_named() -> None:
    A = torch.eye(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="must have shape"):
        dhf.solve_many(A, torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="X0 has shape"):
        dhf.solve_many(A, torch.ones(3, 2, dtype=torch.float64), X0=torch.ones(3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="solve_many takes several"):
        dhf.cg(A, torch.ones(3, 2, dtype=torch.float64))
