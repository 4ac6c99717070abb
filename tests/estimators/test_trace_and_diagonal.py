"""trace and diagonal: exact where they say so, unbiased, and with standard errors that are those of their spread."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dhf
from tests.models import LOSSES, dense_gauss_newton, dense_hessian, problem
from tests.solvers.systems import with_eigenvalues
from tests.solvers.test_eigsh import Counted

ESTIMATORS: dict[str, Callable[..., Any]] = {"trace": dhf.trace, "diagonal": dhf.diagonal}


def decaying(n: int = 120) -> Tensor:
    """Eigenvalues of both signs over four decades."""
    values = torch.logspace(1, -3, n, dtype=torch.float64)
    values[1::3] *= -0.5
    return with_eigenvalues(values)


def test_n_products_are_exact() -> None:
    A = decaying()
    for products in (120, 500):
        found, values = dhf.trace(A, products=products), dhf.diagonal(A, products=products)
        assert found.value == pytest.approx(float(A.trace()), rel=1e-12)
        torch.testing.assert_close(values.values, A.diagonal(), rtol=1e-12, atol=0)
        assert (found.standard_error, float(values.standard_error.max())) == (0.0, 0.0)
        assert found.products == values.products == 120


def test_what_is_of_low_rank_is_exact() -> None:
    A = with_eigenvalues(torch.tensor([5.0, -3.0, 2.0] + [0.0] * 97, dtype=torch.float64))
    found, values = dhf.trace(A, products=15), dhf.diagonal(A, products=15)
    assert found.value == pytest.approx(4.0, rel=1e-10)
    assert found.standard_error < 1e-10
    torch.testing.assert_close(values.values, A.diagonal(), rtol=0, atol=1e-10)
    assert float(values.standard_error.max()) < 1e-10


@pytest.mark.parametrize("deflate", [True, False])
def test_a_trace_is_unbiased_with_the_standard_error_it_states(deflate: bool) -> None:
    A = decaying()
    found = [dhf.trace(A, products=60, deflate=deflate, seed=seed) for seed in range(60)]
    errors = torch.tensor([f.value for f in found]) - float(A.trace())
    ratios = errors / torch.tensor([f.standard_error for f in found])
    assert float(ratios.mean().abs()) < 4 / math.sqrt(60)
    assert 0.85 < float(ratios.square().mean().sqrt()) < 1.25  # Student's distribution has 1.06 at 20 samples
    assert {f.products for f in found} == {60}


@pytest.mark.parametrize("deflate", [True, False])
def test_a_diagonal_is_unbiased_with_the_standard_errors_it_states(deflate: bool) -> None:
    A = decaying()
    found = [dhf.diagonal(A, products=60, deflate=deflate, seed=seed) for seed in range(40)]
    errors = torch.stack([f.values - A.diagonal() for f in found])
    ratios = errors / torch.stack([f.standard_error for f in found])
    assert float(ratios.mean().abs()) < 0.1
    assert 0.85 < float(ratios.square().mean().sqrt()) < 1.25


def test_what_is_taken_out_lowers_the_error() -> None:
    A = decaying()
    for name, estimate in ESTIMATORS.items():
        spread = []
        for deflate in (True, False):
            found = [estimate(A, products=60, deflate=deflate, seed=seed) for seed in range(30)]
            truth = float(A.trace()) if name == "trace" else A.diagonal()
            values = [(f.value if name == "trace" else f.values) - truth for f in found]
            spread.append(math.sqrt(sum(float(torch.as_tensor(v).square().sum()) for v in values)))
        assert spread[0] < 0.7 * spread[1], name


def test_curvature_of_a_network() -> None:
    objective, batch = problem("mlp", "cross_entropy", weight_decay=0.1)
    H = dense_hessian(objective.module, batch, LOSSES["cross_entropy"][1], 0.1)
    G = dense_gauss_newton(objective.module, batch, LOSSES["cross_entropy"][1], 0.1)
    with dhf.Hessian(objective, [batch]) as A, dhf.GaussNewton(objective, [batch]) as B:
        assert A.trace(products=43).value == pytest.approx(float(H.trace()), rel=1e-12)
        assert A.shifted(0.5).trace(products=43).value == pytest.approx(float(H.trace()) + 21.5, rel=1e-12)
        torch.testing.assert_close(B.diagonal(products=43).values, G.diagonal(), rtol=1e-12, atol=1e-15)
        found = B.trace(products=36)  # as many as sampled here leave little
        assert abs(found.value - float(G.trace())) < 5 * found.standard_error + 1e-9
        assert found.products == 36


def test_float32_differs_by_rounding_alone() -> None:
    A = decaying()
    wide, narrow = (dhf.diagonal(matrix, products=45) for matrix in (A, A.float()))
    torch.testing.assert_close(narrow.values.double(), wide.values, rtol=1e-4, atol=1e-4)
    assert narrow.values.dtype == torch.float32
    assert dhf.trace(A.float(), products=45).value == pytest.approx(dhf.trace(A, products=45).value, rel=1e-4)


@pytest.mark.parametrize("estimate", [*ESTIMATORS.values(), dhf.spectral_density])
@pytest.mark.parametrize("at", [1, 7])
def test_nan_is_an_error(estimate: Callable[..., Any], at: int) -> None:
    with pytest.raises(dhf.NonFiniteError, match="NaN or infinity"):
        estimate(Counted(decaying(), bad_at=at))


def test_a_single_sample_has_no_standard_error() -> None:
    assert math.isnan(dhf.trace(decaying(), products=1).standard_error)
    assert dhf.diagonal(decaying(), products=1).standard_error.isnan().all()


def test_wrong_arguments_are_named() -> None:
    for estimate in ESTIMATORS.values():
        with pytest.raises(ValueError, match="products must be at least 1"):
            estimate(decaying(), products=0)
    with pytest.raises(ValueError, match="samples and steps"):
        dhf.spectral_density(decaying(), samples=0)
