"""empirical_fisher: its formula from the gradients of single samples, its arguments."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import dhf
from dhf.errors import PerSampleError
from dhf.preconditioners import empirical_fisher
from tests.models import LOSSES, flat, problem, split
from tests.preconditioners.dense import assert_positive_definite, vectors


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("exponent", [None, 0.0, 1.0])
def test_formula(loss: str, weight_decay: float, exponent: float | None) -> None:
    objective, (x, y) = problem("mlp", loss, weight_decay=weight_decay)
    squares = torch.zeros(43, dtype=torch.float64)
    for i in range(7):
        value = LOSSES[loss][1](objective.module(x[i : i + 1]), y[i : i + 1])
        squares += flat(torch.autograd.grad(value, list(objective.module.parameters()))).square() / 7
    (r,) = vectors(43, 1).T
    options = {} if exponent is None else {"exponent": exponent}
    with dhf.GaussNewton(objective, split((x, y), [2, 4, 1])) as A:
        products = A.products
        found = empirical_fisher(A, 0.01, **options)(r)
        assert A.products == products
    power = 0.75 if exponent is None else exponent
    torch.testing.assert_close(found, r * (squares + 0.01 + weight_decay) ** -power, rtol=1e-11, atol=0.0)


def test_positive_definite() -> None:
    objective, batch = problem("mlp", "bce")
    with dhf.GaussNewton(objective, [batch]) as A:
        assert_positive_definite(empirical_fisher(A, 1e-6), 43)


def test_arguments_out_of_range() -> None:
    objective, batch = problem("mlp", "bce")
    with dhf.GaussNewton(objective, [batch]) as A:
        for damping in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match=f"empirical-Fisher.* needs positive damping, got {damping}"):
                empirical_fisher(A, damping)
        for exponent in (-0.1, 1.1, math.nan):
            with pytest.raises(ValueError, match=rf"exponent must be in \[0, 1\], got {exponent}"):
                empirical_fisher(A, 1.0, exponent=exponent)


def test_weight_decay_stands_in_for_damping() -> None:
    objective, batch = problem("mlp", "bce", weight_decay=0.1)
    with dhf.GaussNewton(objective, [batch]) as A:
        assert_positive_definite(empirical_fisher(A, 0.0), 43)


def test_dropout_is_refused_by_name() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    with (
        dhf.GaussNewton(dhf.Objective(module, nn.MSELoss()), [(x, x[:, :3])]) as A,
        pytest.raises(PerSampleError, match=r"the loss cannot be differentiated sample by sample.*dropout"),
    ):
        empirical_fisher(A, 1.0)
