"""minres: SciPy's iterates, monotone residuals, least squares on singular systems and nowhere else, solves that go on."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dhf import Reason, minres
from tests.solvers.systems import Counting, indefinite, orthogonal, spd, vector, with_eigenvalues


def scipy_iterates(A: Tensor, b: Tensor, iterations: int, M: Tensor | None = None) -> list[Tensor]:
    """The iterates of SciPy's minres."""
    iterates: list[np.ndarray] = []
    scipy.sparse.linalg.minres(
        A.numpy(),
        b.numpy(),
        rtol=1e-15,
        maxiter=iterations,
        M=None if M is None else M.numpy(),
        callback=lambda x: iterates.append(x.copy()),
    )
    return [torch.from_numpy(x) for x in iterates]


# iterates


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("matrix", ["definite", "indefinite", "singular"])
def test_iterates_are_those_of_scipy(matrix: str, preconditioned: bool) -> None:
    A = {"definite": spd(40), "indefinite": indefinite(40), "singular": with_eigenvalues(torch.arange(40.0).double())}[
        matrix
    ]
    b = A @ vector(40)
    M = spd(40, 10.0, seed=7) if preconditioned else None
    truth = scipy_iterates(A, b, 16, M)  # later ones differ by how rounding grows
    solution = minres(
        A, b, rtol=0.0, max_iterations=16, snapshot_ratio=1.0001, preconditioner=None if M is None else lambda r: M @ r
    )
    assert [i.number for i in solution.iterates] == list(range(1, 17))
    for kept in solution.iterates:
        torch.testing.assert_close(kept.x, truth[kept.number - 1], rtol=1e-6, atol=1e-8)


@given(n=st.integers(1, 30), condition=st.floats(1, 1e4), seed=st.integers(0, 1000))
def test_solves_indefinite_systems(n: int, condition: float, seed: int) -> None:
    A, b = indefinite(n, condition, seed), vector(n, seed + 1)
    solution = minres(A, b, rtol=1e-7, max_iterations=100 * n)
    assert solution.reason is Reason.RESIDUAL_TOLERANCE
    error = torch.linalg.vector_norm(solution.x - torch.linalg.solve(A, b))
    assert float(error) <= 1.1e-7 * condition * float(b.norm())


def test_residuals_are_the_least_in_the_krylov_space_and_never_grow() -> None:
    A, b = indefinite(30), vector(30)
    solution = minres(A, b, rtol=1e-9)
    norms = [line.residual_norm for line in solution.history]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(norms))
    for k in (1, 2, 5, 10):
        basis = torch.linalg.qr(torch.stack([torch.linalg.matrix_power(A, j) @ b for j in range(k)], dim=1))[0]
        best = torch.linalg.lstsq(A @ basis, b).solution
        assert norms[k] == pytest.approx(float((b - A @ basis @ best).norm()), rel=1e-8)


def test_the_plain_residual_ends_a_preconditioned_solve() -> None:
    A, b, scale = indefinite(40), vector(40), torch.logspace(-3, 3, 40, dtype=torch.float64)
    solution = minres(A, b, rtol=1e-5, preconditioner=lambda r: r * scale, max_iterations=4000)
    assert solution.reason is Reason.RESIDUAL_TOLERANCE
    for line in solution.history[:-1]:
        assert line.residual_norm > 1e-5 * float(b.norm())
    assert float((b - A @ solution.x).norm()) <= 1.01e-5 * float(b.norm())


def test_warm_start_solves_and_leaves_x0_alone() -> None:
    A, b, x0 = indefinite(10), vector(10), vector(10, 3)
    kept = x0.clone()
    solution = minres(A, b, x0=x0, rtol=1e-10)
    torch.testing.assert_close(solution.x, torch.linalg.solve(A, b))
    assert torch.equal(x0, kept)
    assert solution.history[0].residual_norm == pytest.approx(float((b - A @ x0).norm()))
    assert solution.history[0].model == pytest.approx(float(0.5 * x0 @ A @ x0 - b @ x0))


def test_a_solve_that_lost_accuracy_goes_on_from_its_end() -> None:
    A, b = indefinite(30, 1e6), vector(30)
    first = minres(A, b, rtol=1e-10, max_iterations=3000)
    assert first.reason is Reason.ACCURACY_LOST
    second = minres(A, b, x0=first.x, rtol=1e-10, max_iterations=3000)
    assert second.reason is Reason.RESIDUAL_TOLERANCE
    assert second.true_residual_norm < 0.1 * first.true_residual_norm


def test_operator_that_returns_its_argument() -> None:
    class Identity:
        def matvec(self, v: Tensor) -> Tensor:
            return v

    b = vector(5)
    torch.testing.assert_close(minres(Identity(), b, x0=vector(5, 2)).x, b)
    assert torch.equal(b, vector(5))


def test_an_operator_that_overwrites_its_last_product() -> None:
    class Reusing(Counting):
        def __init__(self, A: Tensor) -> None:
            super().__init__(A)
            self._buffer = torch.zeros(len(A), dtype=A.dtype)

        def matvec(self, v: Tensor) -> Tensor:
            return self._buffer.copy_(super().matvec(v))

    A, b = indefinite(20), vector(20)
    torch.testing.assert_close(minres(Reusing(A), b, rtol=1e-9).x, minres(A, b, rtol=1e-9).x)


# singular systems


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0])
@pytest.mark.parametrize("nullity", [1, 10])
def test_least_squares_whatever_the_other_eigenvalues(nullity: int, condition: float, dtype: torch.dtype) -> None:
    values = torch.logspace(0, -float(np.log10(condition)), 40, dtype=torch.float64)
    values[::2] *= -1
    values[5 : 5 + nullity] = 0
    A, b = with_eigenvalues(values), vector(40)
    solution = minres(A.to(dtype), b.to(dtype), rtol=1e-6, max_iterations=2000)
    assert solution.reason is Reason.LEAST_SQUARES_SOLUTION
    best = torch.linalg.lstsq(A, b, driver="gelsd", rcond=1e-10).solution
    least, eps = float((b - A @ best).norm()), torch.finfo(dtype).eps
    residual = b - A @ solution.x.double()
    assert float(residual.norm()) <= least * (1 + 100 * eps)
    assert float((A @ residual).norm()) <= 2 * eps**0.5 * least
    assert float(solution.x.norm()) <= 10 * condition * float(b.norm())
    assert solution.iterations <= len(solution.history) - 1
    assert solution.residual_norm == solution.history[solution.iterations].residual_norm


def test_least_squares_from_a_start_of_ones_own() -> None:
    A, b, x0 = with_eigenvalues(torch.arange(20.0).double()), vector(20), vector(20, 9)
    solution = minres(A, b, x0=x0)
    assert solution.reason is Reason.LEAST_SQUARES_SOLUTION
    assert solution.true_residual_norm == pytest.approx(abs(float(orthogonal(20)[:, 0] @ b)))


@pytest.mark.parametrize("n", [2, 20, 100])
def test_right_hand_side_in_the_null_space(n: int) -> None:
    A = with_eigenvalues(torch.linspace(0, 1, n, dtype=torch.float64))
    b = orthogonal(n)[:, 0].clone()
    solution = minres(A, b)
    assert (solution.reason, solution.iterations) == (Reason.LEAST_SQUARES_SOLUTION, 0)
    assert not solution.x.any()


@pytest.mark.parametrize("smallest", [1e-4, 1e-6, 1e-8, 1e-10])
@pytest.mark.parametrize("cluster", [1, 5, 19])
def test_an_ill_conditioned_system_is_not_called_singular(cluster: int, smallest: float) -> None:
    values = torch.ones(20, dtype=torch.float64)
    values[:cluster] = torch.linspace(1, 10, cluster, dtype=torch.float64) * smallest
    A = with_eigenvalues(values)
    for b in (vector(20), A @ vector(20), orthogonal(20)[:, :cluster].sum(1)):
        solution = minres(A, b, rtol=1e-12, max_iterations=1000)
        assert solution.reason in (Reason.RESIDUAL_TOLERANCE, Reason.ACCURACY_LOST)


def test_right_hand_side_that_is_almost_consistent() -> None:
    values = torch.linspace(1, 2, 20, dtype=torch.float64)
    values[0] = 0
    A = with_eigenvalues(values)
    b = A @ vector(20) + 1e-6 * orthogonal(20)[:, 0]
    assert minres(A, b, rtol=1e-5).reason is Reason.RESIDUAL_TOLERANCE
    assert minres(A, b, rtol=1e-9).reason is Reason.LEAST_SQUARES_SOLUTION
