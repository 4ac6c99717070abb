"""Nystrom: the formula of Frangella, Tropp and Udell in dense matrices, conditions, refresh rules, state."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dhf
from dhf.preconditioners import Nystrom
from tests.models import LOSSES, dense_gauss_newton, problem, relative_error
from tests.preconditioners.dense import Matrix, as_matrix, assert_positive_definite, powers, spectrum, vectors


def preconditioned_eigenvalues(precondition: Callable[[Tensor], Tensor], A: Tensor, damping: float) -> Tensor:
    """Of P⁻¹ (A + damping·I), by the congruent symmetric matrix."""
    n = len(A)
    P = as_matrix(precondition, n)
    L = torch.linalg.cholesky(0.5 * (P + P.T))
    return torch.linalg.eigvalsh(L.T @ (A + damping * torch.eye(n, dtype=A.dtype)) @ L)


def condition(precondition: Callable[[Tensor], Tensor], A: Tensor, damping: float) -> float:
    values = preconditioned_eigenvalues(precondition, A, damping)
    return float(values[-1] / values[0])


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_formula(rank: int) -> None:
    A, mu = Matrix(spectrum(powers(1e-3, 1e3, 12))), 0.02
    found = as_matrix(Nystrom(rank=rank)(A, mu), 12)
    directions = torch.stack(A.multiplied, 1)
    assert directions.shape == (12, rank)
    images = A.A @ directions
    low_rank = images @ torch.linalg.inv(directions.T @ images) @ images.T
    values, vectors = torch.linalg.eigh(0.5 * (low_rank + low_rank.T))
    values, U = values[-rank:], vectors[:, -rank:]
    truth = (values[0] + mu) * U @ torch.diag(1 / (values + mu)) @ U.T + torch.eye(12).double() - U @ U.T
    assert relative_error(found, truth) < 1e-9


@pytest.mark.parametrize("condition_number", [1.0, 1e4, 1e8])
@pytest.mark.parametrize("rank", [15, 100])
def test_full_rank_is_the_inverse(condition_number: float, rank: int) -> None:
    A, mu = Matrix(spectrum(powers(1.0, condition_number, 15))), 1e-2
    values = preconditioned_eigenvalues(Nystrom(rank=rank)(A, mu), A.A, mu)
    assert len(A.multiplied) == 15
    # all eigenvalues are λ_n + μ, to the rounding of the largest
    torch.testing.assert_close(values, torch.full((15,), 1.0 + mu).double(), rtol=1e-14 * condition_number, atol=1e-8)


def test_low_rank_plus_small_is_flattened() -> None:
    large, small = powers(1e2, 1e5, 10), 1e-3 * torch.rand(90, dtype=torch.float64)
    A, mu = spectrum(torch.cat([large, small])), 1e-2
    plain = torch.linalg.eigvalsh(A + mu * torch.eye(100).double())
    assert plain[-1] / plain[0] > 1e6
    assert condition(Nystrom(rank=20)(Matrix(A), mu), A, mu) < 1.5
    assert condition(Nystrom(rank=5)(Matrix(A), mu), A, mu) > 100  # too few directions do not do


def test_expected_condition_is_below_28_at_twice_the_effective_dimension() -> None:
    """Theorem 1.1 of the paper: rank 2⌈1.5 d_eff(μ)⌉ + 1 gives E κ < 28."""
    eigenvalues, mu = 1e4 * torch.arange(1, 121, dtype=torch.float64) ** -3, 1.0
    A = spectrum(eigenvalues)
    rank = 2 * math.ceil(1.5 * float((eigenvalues / (eigenvalues + mu)).sum())) + 1
    assert rank < 90  # of 120, and a condition of 1e4 without
    assert sum(condition(Nystrom(rank=rank, seed=seed)(Matrix(A), mu), A, mu) for seed in range(5)) / 5 < 28


def test_new_damping_does_not_outdate_the_sample() -> None:
    A = Matrix(spectrum(torch.cat([powers(1e2, 1e5, 10), torch.full((40,), 1e-6).double()])))
    nystrom = Nystrom(rank=15, refresh=3)
    for mu in (1.0, 1e-3, 1e-1):
        assert condition(nystrom(A, mu), A.A, mu) < 1.1
    assert len(A.multiplied) == 15


def test_on_a_gauss_newton_matrix_with_weight_decay() -> None:
    objective, batch = problem("mlp", "cross_entropy", weight_decay=0.05)
    truth = dense_gauss_newton(objective.module, batch, LOSSES["cross_entropy"][1], decay=0.05)
    with dhf.GaussNewton(objective, [batch]) as A:
        for damping in (0.0, 0.1):  # weight decay alone damps, too
            # 7 samples of 3 classes: the matrix without decay has rank 14
            assert condition(Nystrom(rank=20)(A, damping), truth, damping) < 1 + 1e-6


@pytest.mark.parametrize("rank", [1, 4, 10])
@pytest.mark.parametrize("damping", [1e-6, 1.0])
def test_positive_definite(rank: int, damping: float) -> None:
    assert_positive_definite(Nystrom(rank=rank)(Matrix(spectrum(powers(1e-8, 1e3, 10))), damping), 10)


def test_positive_definite_on_an_indefinite_matrix() -> None:
    eigenvalues = torch.cat([powers(1e-2, 1e2, 6), torch.tensor([-3.0, -0.1]).double()])
    for rank in (3, 8):
        assert_positive_definite(Nystrom(rank=rank)(Matrix(spectrum(eigenvalues)), 0.1), 8)


@pytest.mark.parametrize("scale", [0.0, 1e-300, 1e-30, 1e30])
def test_matrices_of_any_scale(scale: float) -> None:
    A = Matrix(scale * spectrum(powers(1.0, 1e3, 6)))
    precondition = Nystrom(rank=6)(A, 1.0)
    (r,) = vectors(6, 1).T
    if scale < 1:
        torch.testing.assert_close(precondition(r), r)
    assert_positive_definite(precondition, 6, 1e-6)


def test_rank_deficient_matrix() -> None:
    A = Matrix(spectrum(torch.cat([powers(1.0, 10.0, 3), torch.zeros(9).double()])))
    values = preconditioned_eigenvalues(Nystrom(rank=12)(A, 0.1), A.A, 0.1)
    torch.testing.assert_close(values, torch.full((12,), 0.1).double(), rtol=1e-6, atol=0.0)


def test_float32() -> None:
    A = spectrum(torch.cat([powers(1e2, 1e4, 10), torch.full((40,), 1e-3).double()]))
    precondition = Nystrom(rank=20)(Matrix(A.float()), 1.0)
    (r,) = vectors(50, 1).float().T
    assert precondition(r).dtype == torch.float32
    P = as_matrix(precondition, 50, torch.float32).double()
    values = torch.linalg.eigvals(P @ (A + torch.eye(50).double())).real
    assert values.min() > 0.9
    assert values.max() < 1.1


# renewal


def test_renewed_once_it_was_applied_rank_times() -> None:
    A, nystrom = Matrix(spectrum(powers(1.0, 100.0, 10))), Nystrom(rank=4)
    (r,) = vectors(10, 1).T
    first = nystrom(A, 0.1)
    assert len(A.multiplied) == 4
    for _ in range(3):
        first(r)
    second = nystrom(A, 0.1)
    assert len(A.multiplied) == 4
    second(r)
    third = nystrom(A, 0.1)
    assert len(A.multiplied) == 8
    assert not torch.equal(torch.stack(A.multiplied[:4]), torch.stack(A.multiplied[4:]))
    for _ in range(3):
        third(r)
    nystrom(A, 0.1)
    assert len(A.multiplied) == 8


@pytest.mark.parametrize(("refresh", "products"), [(1, [2, 4, 6, 8, 10]), (2, [2, 2, 4, 4, 6]), (3, [2, 2, 2, 4, 4])])
def test_renewed_every_so_many_calls(refresh: int, products: list[int]) -> None:
    A, nystrom = Matrix(spectrum(powers(1.0, 100.0, 10))), Nystrom(rank=2, refresh=refresh)
    (r,) = vectors(10, 1).T
    taken = []
    for _ in range(5):
        precondition = nystrom(A, 0.1)
        for _ in range(10):
            precondition(r)
        taken.append(len(A.multiplied))
    assert taken == products


def test_renewed_for_another_size() -> None:
    nystrom = Nystrom(rank=3)
    nystrom(Matrix(torch.eye(5).double()), 1.0)
    B = Matrix(spectrum(powers(1.0, 10.0, 3)))
    assert condition(nystrom(B, 1.0), B.A, 1.0) < 1 + 1e-9


@pytest.mark.parametrize("refresh", [None, 3])
def test_state_goes_on_with_the_same_bits(refresh: int | None) -> None:
    A = Matrix(spectrum(powers(1e-2, 1e2, 10)))
    R = vectors(10, 8).T
    one = Nystrom(rank=4, refresh=refresh, seed=5)
    for r in R[:3]:
        one(A, 0.1)(r)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other = Nystrom(rank=4, refresh=refresh, seed=5)
    other.load_state_dict(torch.load(file, weights_only=True))
    for step, r in enumerate(R):
        before = len(A.multiplied)
        found = one(A, 0.01 * step + 0.1)(r)
        taken = len(A.multiplied) - before
        assert torch.equal(other(A, 0.01 * step + 0.1)(r), found)
        assert len(A.multiplied) == before + 2 * taken  # renewed at the same calls


@pytest.mark.parametrize(("name", "value"), [("rank", 0), ("rank", -2), ("refresh", 0)])
def test_numbers_out_of_range(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
        Nystrom(**{name: value})


@pytest.mark.parametrize("damping", [0.0, -1.0, math.nan])
def test_damping_out_of_range(damping: float) -> None:
    A = Matrix(torch.eye(2))
    with pytest.raises(ValueError, match=f"Nystrom preconditioner needs positive damping, got {damping}"):
        Nystrom()(A, damping)
    assert not A.multiplied
