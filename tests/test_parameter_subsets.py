"""Some of a module's parameters: which a pattern chooses, and that the curvature in them is a block of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dhf
from dhf.operator import NormalMatrix
from dhf.parameters import Parameters
from tests.models import LOSSES, dense, dense_gauss_newton, dense_hessian, mlp, problem, split


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("0.weight", ["0.weight"]),
        ("0", ["0.weight", "0.bias"]),
        ("0.", ["0.weight", "0.bias"]),
        ("*.bias", ["0.bias", "2.bias"]),
        ("?.weight", ["0.weight", "2.weight"]),
        (["2.bias", "0.weight"], ["0.weight", "2.bias"]),
        ("*", ["0.weight", "0.bias", "2.weight", "2.bias"]),
    ],
)
def test_patterns_choose_parameters_in_the_modules_order(patterns: str | list[str], names: list[str]) -> None:
    parameters = Parameters(mlp(), patterns)
    assert list(parameters.names) == names
    assert len(parameters.others) == 4 - len(names)
    assert len(parameters.read_all()) == 43
    assert torch.equal(parameters.read_all()[: parameters.numel], parameters.read())


def test_a_tied_parameter_goes_by_any_of_its_names_and_a_frozen_one_by_none() -> None:
    module = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
    module["second"].weight = module["first"].weight
    module["first"].bias.requires_grad_(False)
    assert Parameters(module, "second.*").names == ("first.weight", "second.bias")
    with pytest.raises(dhf.UsageError, match=r"'first\.bias' fits the name of no trainable parameter"):
        Parameters(module, "first.bias")


def test_a_pattern_that_fits_nothing_is_named() -> None:
    with pytest.raises(dhf.UsageError, match=r"parameters names none; give names or patterns such as 'layers\.2\.\*'"):
        Parameters(mlp(), [])
    with pytest.raises(
        dhf.UsageError, match=r"'0\.wieght' fits the name of no trainable parameter; a name is '0\.weight'"
    ):
        Parameters(mlp(), ["2.bias", "0.wieght"])


@pytest.mark.parametrize("products", ["retained", "traced"])
@pytest.mark.parametrize("retain", ["all", "none"])
@pytest.mark.parametrize("patterns", ["2", "0.weight", ["*.bias"]])
def test_curvature_in_some_parameters_is_a_block_of_the_whole(
    patterns: str | list[str], retain: str, products: str
) -> None:
    objective, batch = problem("mlp", "cross_entropy", weight_decay=0.1)
    whole = Parameters(objective.module)
    wanted = set(Parameters(objective.module, patterns).names)
    chosen = torch.cat(
        [torch.full((p.numel(),), name in wanted) for name, p in zip(whole.names, whole.tensors, strict=True)]
    )
    matrices = {
        dhf.Hessian: dense_hessian(objective.module, batch, LOSSES["cross_entropy"][1], 0.1),
        dhf.GaussNewton: dense_gauss_newton(objective.module, batch, LOSSES["cross_entropy"][1], 0.1),
    }
    options = {"retain": retain, "products": products}
    for kind, matrix in matrices.items():
        with (
            kind(objective, split(batch, [4, 3]), parameters=patterns, **options) as A,
            kind(objective, [batch]) as all_,
        ):
            assert A.shape == (int(chosen.sum()),) * 2
            assert A.loss == pytest.approx(all_.loss, rel=1e-12)
            torch.testing.assert_close(A.gradient, all_.gradient[chosen], rtol=1e-10, atol=1e-14)
            torch.testing.assert_close(dense(A), matrix[chosen][:, chosen], rtol=1e-10, atol=1e-12)
    with dhf.Fisher(objective, [batch], parameters=patterns) as A, dhf.Fisher(objective, [batch]) as all_:
        torch.testing.assert_close(dense(A), dense(all_)[chosen][:, chosen], rtol=1e-10, atol=1e-12)


def test_a_parameter_that_is_left_out_must_not_move_either() -> None:
    objective, batch = problem("mlp", "mse")
    with dhf.Hessian(objective, [batch], parameters="2") as A:
        objective.module[0].weight.data.add_(0.1)
        with pytest.raises(dhf.StaleGraphError, match="a parameter that was left out changed"):
            A @ torch.ones_like(A.gradient)


@pytest.mark.parametrize("precondition", [dhf.KFAC(), dhf.Nystrom(rank=10), dhf.empirical_fisher, dhf.jacobi])
def test_systems_in_some_parameters_are_solved_with_preconditioners(precondition: Any) -> None:
    objective, batch = problem("mlp", "cross_entropy")
    with dhf.GaussNewton(objective, [batch], parameters="0.*") as A:
        M = precondition(A, 0.1)
        solution = dhf.cg(A.shifted(0.1), A.gradient, rtol=1e-10, preconditioner=M)
        truth = torch.linalg.solve(dense(A) + 0.1 * torch.eye(25).double(), A.gradient)
    assert solution.reason is dhf.Reason.RESIDUAL_TOLERANCE
    torch.testing.assert_close(solution.x, truth, rtol=1e-7, atol=1e-10)


def test_the_dense_matrix_of_some_parameters() -> None:
    objective, batch = problem("mlp", "mse")
    with dhf.GaussNewton(objective, [batch], parameters="2.*") as A:
        torch.testing.assert_close(NormalMatrix(A, in_samples=False).matrix, dense(A), rtol=1e-10, atol=1e-14)
        rows = NormalMatrix(A, in_samples=True).rows
        torch.testing.assert_close(rows.T @ rows, dense(A), rtol=1e-10, atol=1e-14)
