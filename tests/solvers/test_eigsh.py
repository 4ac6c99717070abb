"""eigsh: eigenvalues and vectors against dense ones, bounds that hold, and ends that are what they say."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dhf
from dhf.solvers.lanczos import Lanczos
from dhf.solvers.random_vectors import normal_vector
from dhf.vector_space import Replicated

DTYPES = [torch.float64, torch.float32]


def spectrum(values: Tensor, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))
    A = (Q * values) @ Q.T
    return (0.5 * (A + A.T)).to(dtype)


def mixed(n: int = 300) -> Tensor:
    """Eigenvalues of both signs that fall off over five decades."""
    values = torch.logspace(1, -4, n, dtype=torch.float64)
    values[::5] *= -0.4
    return values


def truth(A: Tensor, which: str, k: int) -> Tensor:
    values = torch.linalg.eigvalsh(A.double())
    order = {"largest": values, "smallest": -values, "magnitude": values.abs()}[which].argsort(descending=True)
    return values[order[:k]]


def check(A: Tensor, found: dhf.Eigenpairs, which: str, tol: float) -> None:
    """What eigsh promises, by the dense matrix."""
    k, norm = len(found.values), float(torch.linalg.matrix_norm(A.double(), 2))
    values, X = truth(A, which, k), found.vectors.double()
    eps = torch.finfo(A.dtype).eps
    assert found.reason is dhf.Reason.RESIDUAL_TOLERANCE
    # one that is not found yet may stand between others, within the tolerance
    assert float((found.values - values).abs().max()) <= 3 * max(tol, 50 * eps) * norm
    assert float((X.T @ X - torch.eye(k)).abs().max()) < 50 * eps
    residuals = torch.linalg.vector_norm(A.double() @ X - X * found.values, dim=0)
    assert float(residuals.max()) <= 2 * max(tol, 50 * eps) * norm
    torch.testing.assert_close(found.residual_norms, residuals, rtol=1e-6, atol=50 * eps * norm)
    nearest = (found.values[:, None] - torch.linalg.eigvalsh(A.double())).abs().min(1).values
    assert (nearest <= found.residual_norms + 50 * eps * norm).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 6, 20])
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_pairs_are_those_of_the_dense_matrix(which: str, k: int, dtype: torch.dtype) -> None:
    A = spectrum(mixed(), dtype=dtype)
    found = dhf.eigsh(A, k, which=which)
    check(A, found, which, 1e-8 if dtype == torch.float64 else 1e-5)
    assert found.products < 250
    assert found.vectors.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("basis", [9, 12, 40])
def test_a_small_basis_restarts_and_finds_the_same(basis: int, dtype: torch.dtype) -> None:
    A = spectrum(torch.linspace(-1, 2, 200, dtype=torch.float64), dtype=dtype)
    found = dhf.eigsh(A, 5, basis=basis, tol=1e-6)
    assert found.restarts > 2
    check(A, found, "largest", 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (2, 2), (30, 29), (30, 30), (150, 149), (150, 100)])
def test_k_may_come_close_to_n(n: int, k: int, dtype: torch.dtype) -> None:
    A = spectrum(mixed(n), dtype=dtype)
    check(A, dhf.eigsh(A, k), "largest", 1e-8 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("values", "k"),
    [
        ([3.0] * 60, 4),
        ([0.0] * 60, 4),
        ([5.0] * 2 + [1.0] * 60, 2),
        ([5.0] * 3 + [2.0] * 30 + [-7.0] * 30, 5),
        ([9.0, 8.0, 7.0] + [0.0] * 80, 8),
    ],
    ids=["identity", "zero", "double", "three values", "low rank"],
)
@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_multiple_eigenvalues_are_found_where_krylov_spaces_are_exhausted(
    which: str, values: list[float], k: int, dtype: torch.dtype
) -> None:
    A = torch.diag(torch.tensor(values, dtype=dtype))
    found = dhf.eigsh(A, k, which=which)
    assert found.reason is dhf.Reason.RESIDUAL_TOLERANCE
    torch.testing.assert_close(found.values, truth(A, which, k), rtol=1e-5, atol=1e-5)
    X = found.vectors.double()
    torch.testing.assert_close(X.T @ X, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-5)


@given(st.integers(1, 40), st.data())
def test_any_matrix_any_number(n: int, data: Any) -> None:
    k = data.draw(st.integers(1, n))
    which = data.draw(st.sampled_from(["largest", "smallest"]))
    distinct = data.draw(st.lists(st.integers(-3, 3), min_size=n, max_size=n))
    A = spectrum(torch.tensor(distinct, dtype=torch.float64), seed=n)
    found = dhf.eigsh(A, k, which=which)
    torch.testing.assert_close(found.values, truth(A, which, k), rtol=1e-7, atol=1e-7)


def test_the_same_seed_finds_the_same_bits_and_another_the_same_numbers() -> None:
    A = spectrum(mixed())
    first, again, other = dhf.eigsh(A, 3), dhf.eigsh(A, 3), dhf.eigsh(A, 3, seed=5)
    assert torch.equal(first.vectors, again.vectors)
    assert torch.equal(first.values, again.values)
    assert not torch.equal(first.vectors, other.vectors)
    torch.testing.assert_close(first.values, other.values, rtol=1e-12, atol=0)


def test_vectors_lie_on_the_side_of_the_start() -> None:
    A = spectrum(mixed())
    v0 = normal_vector(3, 0, A[0])
    found, turned = dhf.eigsh(A, 4, v0=v0), dhf.eigsh(A, 4, v0=-v0)
    assert (found.vectors.T @ v0 > 0).all()
    torch.testing.assert_close(turned.vectors, -found.vectors, rtol=0, atol=1e-6)


def test_an_eigenvector_as_start_still_leads_to_the_largest() -> None:
    A = torch.diag(torch.arange(1.0, 101.0, dtype=torch.float64))
    found = dhf.eigsh(A, 2, v0=torch.eye(100, dtype=torch.float64)[0])
    torch.testing.assert_close(found.values, torch.tensor([100.0, 99.0], dtype=torch.float64))


def test_what_is_not_wanted_is_not_paid_for() -> None:
    A = spectrum(mixed())
    full, bare = dhf.eigsh(A, 5), dhf.eigsh(A, 5, vectors=False, true_residual=False)
    assert bare.products == full.products - 5
    assert bare.vectors is None
    assert bare.residual_norms.isnan().all()
    torch.testing.assert_close(bare.values, full.values, rtol=1e-10, atol=0)
    torch.testing.assert_close(bare.error_bounds, full.residual_norms, rtol=0.01, atol=1e-12)


def test_a_limit_gives_the_best_pairs_so_far_with_their_bounds() -> None:
    A = spectrum(torch.linspace(-1, 2, 200, dtype=torch.float64))
    found = dhf.eigsh(A, 4, max_iterations=12)
    assert found.reason is dhf.Reason.ITERATION_LIMIT
    assert not found.converged
    assert found.products == 12 + 4
    assert float(found.residual_norms.max()) > 1e-3
    for value, bound in zip(found.values, found.residual_norms, strict=True):
        assert float((torch.linalg.eigvalsh(A) - value).abs().min()) <= float(bound) + 1e-12
    early = dhf.eigsh(A, 4, max_iterations=2)
    assert (early.reason, len(early.values), early.vectors.shape) == (dhf.Reason.ITERATION_LIMIT, 2, (200, 2))


class Counted:
    """An object with nothing but a shape and products, which go wrong at some point."""

    def __init__(self, A: Tensor, bad_at: int = 1 << 30, error: Exception | None = None) -> None:
        self.A, self.shape, self.count, self._bad_at, self._error = A, A.shape, 0, bad_at, error

    def matvec(self, v: Tensor) -> Tensor:
        self.count += 1
        if self.count == self._bad_at:
            if self._error is not None:
                raise self._error
            return torch.full_like(v, math.nan)
        return self.A @ v


def test_any_object_with_a_shape_and_products_will_do() -> None:
    counted = Counted(spectrum(mixed()))
    found = dhf.eigsh(counted, 3)
    check(counted.A, found, "largest", 1e-8)
    assert found.products == counted.count


class Itself:
    """The identity, which returns what it is given."""

    shape, dtype = (9, 9), torch.float64

    def matvec(self, v: Tensor) -> Tensor:
        return v


def test_a_product_that_is_the_vector_itself_is_left_alone() -> None:
    torch.testing.assert_close(dhf.eigsh(Itself(), 3).values, torch.ones(3, dtype=torch.float64))
    assert dhf.trace(Itself(), products=9).value == 9.0


@pytest.mark.parametrize("at", [1, 2, 9])
def test_nan_ends_the_search_with_what_was_found_before(at: int) -> None:
    A = spectrum(mixed())
    found = dhf.eigsh(Counted(A, bad_at=at), 3)
    assert found.reason is dhf.Reason.NON_FINITE
    assert len(found.values) == min(3, at - 1)
    assert found.vectors.shape == (300, len(found.values))
    assert found.vectors.isfinite().all()
    assert found.residual_norms.isnan().all()


def test_nan_in_the_last_products_is_told() -> None:
    A = spectrum(mixed())
    count = dhf.eigsh(A, 3).products
    assert dhf.eigsh(Counted(A, bad_at=count - 1), 3).residual_norms.isnan().any()
    assert not dhf.eigsh(Counted(A, bad_at=count - 1), 3).converged


def test_what_a_product_raises_comes_through() -> None:
    with pytest.raises(LookupError, match="no such shard"):
        dhf.eigsh(Counted(spectrum(mixed()), bad_at=4, error=LookupError("no such shard")), 3)


def test_a_matrix_that_is_not_symmetric_is_found_out() -> None:
    A = torch.randn(80, 80, dtype=torch.float64)
    assert dhf.eigsh(A, 3).reason is dhf.Reason.NOT_SYMMETRIC


def test_float32_is_told_where_it_cannot_reach_the_tolerance() -> None:
    A = spectrum(mixed(), dtype=torch.float32)

    class Noisy:
        shape, dtype = A.shape, torch.float32

        def matvec(self, v: Tensor) -> Tensor:
            return A @ v + 1e-4 * torch.randn_like(v)

    found = dhf.eigsh(Noisy(), 3, tol=1e-5)
    assert found.reason is dhf.Reason.ACCURACY_LOST
    assert float(found.residual_norms.max()) > 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "k must be from 1 to n = 300, got 0"),
        ({"k": 301}, "k must be from 1 to n = 300, got 301"),
        ({"which": "LM"}, "choose from largest, smallest, magnitude"),
        ({"tol": 1.0}, "tol must be in"),
        ({"basis": 6}, "basis must be above k = 6"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"v0": torch.zeros(300, dtype=torch.float64)}, "v0 must not be zero"),
        ({"v0": torch.ones(3, dtype=torch.float64)}, "shape"),
        ({"v0": torch.ones(300, dtype=torch.float32)}, "float32"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dhf.eigsh(spectrum(mixed()), **options)


def test_products_and_starts_may_carry_graphs() -> None:
    A = spectrum(mixed(30)).requires_grad_(True)
    v0 = torch.ones(30, dtype=torch.float64, requires_grad=True)
    found = dhf.eigsh(Counted(A), 3, v0=v0)
    torch.testing.assert_close(found.values, truth(A.detach(), "largest", 3))
    assert not found.vectors.requires_grad
    assert dhf.trace(Counted(A), products=30).value == pytest.approx(float(A.detach().trace()))


def test_an_operator_without_a_shape_is_named() -> None:
    class Shapeless:
        def matvec(self, v: Tensor) -> Tensor:
            return v

    with pytest.raises(ValueError, match="Shapeless has no shape"):
        dhf.eigsh(Shapeless(), 1)
    assert dhf.eigsh(Counted(torch.eye(4).double()), 1, v0=torch.ones(4).double()).converged


# the recursion itself


def relation(lanczos: Lanczos, A: Tensor) -> float:
    """How far A V = V T + β v eᵀ is from holding."""
    V = lanczos.basis.rows[: lanczos.j].T
    rest = A @ V - V @ lanczos.T
    rest[:, -1] -= lanczos.beta * lanczos.next
    return float(rest.abs().max())


def test_the_relation_holds_through_restarts_and_drawn_directions() -> None:
    A = spectrum(mixed(50))
    lanczos = Lanczos(Replicated(), 50, normal_vector(0, 0, A[0]), 12, lambda i: normal_vector(1, i, A[0]))
    for turn in range(3):
        while not lanczos.full:
            assert lanczos.advance(A @ lanczos.next) is None
        values, vectors, _ = lanczos.ritz()
        lanczos.restart(values[-5:], vectors[:, -5:])
        V = lanczos.basis.rows[:5].T
        torch.testing.assert_close(V.T @ A @ V, lanczos.T, rtol=0, atol=1e-12)
        values, vectors, bounds = lanczos.ritz()
        X = V @ vectors
        torch.testing.assert_close(torch.linalg.vector_norm(A @ X - X * values, dim=0), bounds, rtol=0, atol=1e-12)
        assert lanczos.advance(A @ lanczos.next) is None
        if turn == 1:
            lanczos.follow(dhf.Reason.INVARIANT_SUBSPACE)
            assert lanczos.beta == 0
            assert float((lanczos.basis.rows[: lanczos.j] @ lanczos.next).abs().max()) < 1e-14
            assert lanczos.advance(A @ lanczos.next) is dhf.Reason.NOT_SYMMETRIC  # as it was led away from what coupled
            return
        assert relation(lanczos, A) < 1e-12


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_others_may_judge_a_borderline_subspace_otherwise(factor: float) -> None:
    tiny = factor * 10 * torch.finfo(torch.float64).eps * 2
    A = torch.diag(torch.tensor([2.0, 1.0, 3.0, 4.0], dtype=torch.float64))
    A[0, 1] = A[1, 0] = tiny
    lanczos = Lanczos(Replicated(), 4, torch.eye(4).double()[0], 4, lambda i: normal_vector(1, i, A[0]))
    own = lanczos.advance(A @ lanczos.next)
    assert own is (dhf.Reason.INVARIANT_SUBSPACE if factor < 1 else None)
    theirs = None if own else dhf.Reason.INVARIANT_SUBSPACE
    lanczos.follow(own)
    before = lanczos.next.clone()
    lanczos.follow(theirs)
    assert not torch.equal(lanczos.next, before)
    expected = torch.eye(4).double()[1] if theirs is None else lanczos.next
    torch.testing.assert_close(lanczos.next.abs(), expected.abs(), rtol=0, atol=1e-12)
    assert (lanczos.beta > 0) == (theirs is None)
    assert float(lanczos.next[0].abs()) < 1e-15
    while not lanczos.complete:
        lanczos.advance(A @ lanczos.next)
    torch.testing.assert_close(lanczos.ritz()[0], torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), rtol=0, atol=1e-12)
