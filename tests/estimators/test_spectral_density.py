"""spectral_density: quadratures that are exact for polynomials, a density that is the dense one's, errors as stated."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import dhf
from dhf.solvers.random_vectors import sign_vector
from tests.models import LOSSES, dense_hessian, problem
from tests.solvers.systems import with_eigenvalues
from tests.solvers.test_eigsh import Counted

VALUES = torch.cat([torch.linspace(-1, 1, 150), torch.tensor([3.0, 5.0, 9.0])]).double()


def broadened(values: Tensor, points: Tensor, width: float) -> Tensor:
    """The density of eigenvalues, each as a Gaussian."""
    bells = torch.exp(-0.5 * ((points[:, None] - values) / width) ** 2)
    return bells.sum(1) / (len(values) * width * math.sqrt(2 * math.pi))


def test_each_quadrature_has_the_moments_of_its_vector() -> None:
    A = with_eigenvalues(VALUES)
    found = dhf.spectral_density(A, samples=3, steps=6, seed=2)
    assert found.nodes.shape == found.weights.shape == (3, 6)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(3, dtype=torch.float64), rtol=1e-12, atol=0)
    for i in range(3):
        v = sign_vector(2, i, A[0])
        power = v
        for m in range(12):  # 2 · 6 - 1 is the last
            moment = float(found.weights[i] @ found.nodes[i] ** m)
            assert moment == pytest.approx(float(v @ power) / len(v), rel=1e-9), m
            power = A @ power


def test_the_density_is_that_of_the_eigenvalues() -> None:
    A = with_eigenvalues(VALUES)
    found = dhf.spectral_density(A, samples=40, steps=60)
    points = found.grid(300, width=0.3)
    density, error = found.density(points, width=0.3)
    assert float(torch.trapezoid(density, points)) == pytest.approx(1.0, abs=2e-3)
    truth = broadened(VALUES, points, 0.3)
    apart = (density - truth) / error.clamp(min=1e-4)
    assert float(apart.square().mean().sqrt()) < 1.5
    assert float((density - truth).abs().max()) < 0.05 * float(truth.max())


def test_the_whole_space_gives_the_eigenvalues_themselves() -> None:
    A = with_eigenvalues(torch.linspace(-1, 2, 20).double())
    found = dhf.spectral_density(A, samples=2, steps=50)
    assert found.products == 40
    for nodes in found.nodes:
        torch.testing.assert_close(nodes, torch.linspace(-1, 2, 20).double(), rtol=0, atol=1e-10)


def test_traces_of_functions_have_the_standard_error_they_state() -> None:
    values = torch.linspace(-2, 1, 100).double()  # no one of them dominates, so that samples are all but normal
    A, truth = with_eigenvalues(values), float(values.exp().sum())
    ratios = []
    for seed in range(60):
        value, error = dhf.spectral_density(A, samples=12, steps=10, seed=seed).trace_of(torch.exp)
        ratios.append((value - truth) / error)
    ratios = torch.tensor(ratios)
    assert float(ratios.mean().abs()) < 0.4
    assert 0.8 < float(ratios.square().mean().sqrt()) < 1.35  # Student's distribution has 1.1 at 12 samples


@pytest.mark.parametrize("matrix", [torch.eye(30), torch.zeros(30, 30), torch.diag(torch.tensor([1.0, 2.0] * 15))])
def test_few_distinct_eigenvalues_take_as_many_products(matrix: Tensor) -> None:
    counted = Counted(matrix.double())
    found = dhf.spectral_density(counted, samples=2, steps=8)
    assert found.products == counted.count == 16
    assert found.trace_of(torch.ones_like)[0] == pytest.approx(30.0, rel=1e-12)
    assert found.trace_of(lambda t: t)[0] == pytest.approx(float(matrix.trace()), rel=1e-10, abs=1e-12)
    assert found.density(found.grid(50))[0].isfinite().all()


def test_curvature_of_a_network() -> None:
    objective, batch = problem("mlp", "bce")
    H = dense_hessian(objective.module, batch, LOSSES["bce"][1])
    with dhf.Hessian(objective, [batch]) as A:
        found = dhf.spectral_density(A, samples=20, steps=43)
    value, error = found.trace_of(torch.square)
    assert abs(value - float(H.square().sum())) < 4 * error
    points = found.grid(200, width=0.02)
    density, error = found.density(points, width=0.02)
    truth = broadened(torch.linalg.eigvalsh(H), points, 0.02)
    assert float(((density - truth) / error.clamp(min=1e-3)).square().mean().sqrt()) < 1.6


def test_one_sample_has_no_spread_and_a_width_must_be_positive() -> None:
    found = dhf.spectral_density(with_eigenvalues(VALUES), samples=1, steps=5)
    assert found.density(found.grid(4))[1].isnan().all()
    with pytest.raises(ValueError, match="width must be positive"):
        found.density(found.grid(4), width=0.0)
