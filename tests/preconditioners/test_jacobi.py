"""jacobi: its formula from the products it took, the diagonal it tends to, its arguments."""

from __future__ import annotations

import math

import pytest
import torch

from dhf.preconditioners import jacobi
from tests.preconditioners.dense import Matrix, as_matrix, assert_positive_definite, powers, spectrum, vectors


@pytest.mark.parametrize("exponent", [0.75, 1.0])
@pytest.mark.parametrize("probes", [1, 10])
def test_formula(probes: int, exponent: float) -> None:
    A = Matrix(spectrum(powers(1e-3, 1e3, 12)))
    found = as_matrix(jacobi(A, 0.1, probes=probes, exponent=exponent), 12)
    V = torch.stack(A.multiplied, 1)
    assert V.shape == (12, probes)
    assert (V.abs() == 1).all()
    diagonal = (V * (A.A @ V)).mean(1).clamp(min=0)
    torch.testing.assert_close(found, torch.diag((diagonal + 0.1) ** -exponent), rtol=1e-12, atol=1e-15)


def test_diagonal_matrices_are_inverted_exactly() -> None:
    d = powers(1e-6, 1e6, 9)
    r = vectors(9, 1)[:, 0]
    torch.testing.assert_close(jacobi(Matrix(torch.diag(d)), 0.5, probes=1, exponent=1.0)(r), r / (d + 0.5))


def test_tends_to_the_diagonal() -> None:
    A, probes = spectrum(powers(1e-2, 1e2, 8)), 4000
    estimate = 1 / jacobi(Matrix(A), 1.0, probes=probes, exponent=1.0)(torch.ones(8).double()) - 1
    # the variance of (v∘Av)_i is the sum of A_ij² off the diagonal
    deviation = ((A.square().sum(1) - A.diagonal().square()) / probes).sqrt()
    assert ((estimate - A.diagonal()).abs() < 4 * deviation).all()


def test_negative_estimates_count_as_zero() -> None:
    A = torch.diag(torch.tensor([-5.0, 2.0], dtype=torch.float64))
    found = jacobi(Matrix(A), 0.5, exponent=1.0)(torch.ones(2).double())
    torch.testing.assert_close(found, torch.tensor([2.0, 0.4], dtype=torch.float64))


def test_positive_definite() -> None:
    assert_positive_definite(jacobi(Matrix(spectrum(powers(1e-6, 1e6, 10))), 1e-3), 10)


def test_seed_names_the_signs() -> None:
    first, again, other = Matrix(torch.eye(30)), Matrix(torch.eye(30)), Matrix(torch.eye(30))
    jacobi(first, 1.0)
    jacobi(again, 1.0)
    jacobi(other, 1.0, seed=1)
    assert torch.equal(torch.stack(first.multiplied), torch.stack(again.multiplied))
    assert not torch.equal(torch.stack(first.multiplied), torch.stack(other.multiplied))
    assert first.multiplied[0].dtype == torch.float32


@pytest.mark.parametrize("damping", [0.0, -1.0, math.nan])
def test_damping_out_of_range(damping: float) -> None:
    with pytest.raises(ValueError, match=f"Jacobi preconditioner needs positive damping, got {damping}"):
        jacobi(Matrix(torch.eye(2)), damping)
