"""direct on explicit matrices, in parameter and in sample space: solutions, fields, and every reason."""

from __future__ import annotations

import math
import types

import numpy as np
import pytest
import torch
from torch import Tensor

from dhf import Reason
from dhf.solvers import Direct, Solution, direct

CONDITIONS = [1.0, 1e2, 1e4, 1e6, 1e8, 1e10]
PRECISIONS = [(c, torch.float64) for c in CONDITIONS] + [(c, torch.float32) for c in CONDITIONS if c <= 1e4]


def orthogonal(n: int, seed: int) -> Tensor:
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return q


def with_eigenvalues(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    q = orthogonal(len(values), seed)
    A = (q * values) @ q.T
    return 0.5 * (A + A.T)


def spd(n: int, condition: float, seed: int = 0) -> Tensor:
    return with_eigenvalues(torch.logspace(0, -math.log10(condition), n, dtype=torch.float64), seed)


def vector(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pinv(A: Tensor, damping: float = 0.0) -> Tensor:
    return torch.linalg.pinv(A + damping * torch.eye(len(A), dtype=A.dtype), rtol=1e-12, hermitian=True)


def assert_fields(solution: Solution, A: Tensor, b: Tensor, damping: float = 0.0) -> None:
    """Norms, model and history are those of the solution's x."""
    x = solution.x
    A = A + damping * torch.eye(len(b), dtype=A.dtype)
    r, model = b - A @ x, float(0.5 * x @ A @ x - b @ x)
    scale = float(A.norm() * x.norm() + b.norm())
    slack = 100 * torch.finfo(x.dtype).eps * scale
    assert solution.true_residual_norm == solution.residual_norm == pytest.approx(float(r.norm()), rel=1e-3, abs=slack)
    assert solution.model == pytest.approx(model, rel=1e-6, abs=slack * float(x.norm()))
    assert solution.iterations == 1
    start, end = solution.history
    assert (start.number, start.model) == (0, 0.0)
    assert start.residual_norm == pytest.approx(float(b.norm()), rel=1e-6)
    assert (end.number, end.residual_norm, end.model) == (1, solution.residual_norm, solution.model)
    (kept,) = solution.iterates
    assert (kept.number, kept.model) == (1, solution.model)
    assert torch.equal(kept.x, x)


# positive definite


@pytest.mark.parametrize("n", [1, 2, 30])
@pytest.mark.parametrize(("condition", "dtype"), PRECISIONS)
def test_positive_definite(n: int, condition: float, dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    A, b = spd(n, condition).to(dtype), vector(n).to(dtype)
    solution = direct(A, b)
    assert solution.x.dtype == dtype
    assert solution.reason is Reason.RESIDUAL_TOLERANCE
    assert solution.direction is None
    r = b.double() - A.double() @ solution.x.double()
    backward = float(r.norm()) / float(A.double().norm() * solution.x.double().norm() + b.double().norm())
    assert backward < 3 * n * eps
    if dtype == torch.float64:
        assert_fields(solution, A, b)
    truth = torch.linalg.solve(A.double(), b.double())
    assert float((solution.x - truth).norm()) <= 30 * n * eps * condition * float(truth.norm())


@pytest.mark.parametrize("scale", [1e-100, 1e-20, 1e20, 1e100])
def test_any_scale(scale: float) -> None:
    A, b = spd(10, 1e4), vector(10)
    solution = direct(scale * A, b)
    assert solution.reason is Reason.RESIDUAL_TOLERANCE
    torch.testing.assert_close(scale * solution.x, torch.linalg.solve(A, b), rtol=1e-10, atol=0.0)


def test_arguments_are_left_alone() -> None:
    A, b = spd(5, 10.0), vector(5)
    kept = A.clone(), b.clone()
    direct(A, b, damping=1.0)
    direct(A - 2 * torch.eye(5), b, damping=1.0)
    assert torch.equal(A, kept[0])
    assert torch.equal(b, kept[1])


@pytest.mark.parametrize("kind", ["definite", "singular", "indefinite"])
def test_one_matrix_and_many_dampings(kind: str) -> None:
    values = torch.logspace(0, -6, 20, dtype=torch.float64)
    if kind != "definite":
        values[5:8] = 0.0 if kind == "singular" else -0.01
    A, b = with_eigenvalues(values), vector(20)
    system = Direct(A, b)
    for damping in (1e-3, 0.0, 0.5, 1e-8, 10.0, 0.02):  # an eigendecomposition at one serves those after it
        solution = system.solve(damping)
        if kind == "indefinite" and damping <= 0.01:
            assert solution.reason is Reason.NEGATIVE_CURVATURE
            continue
        if kind == "singular" and damping == 0.0:
            assert solution.reason is Reason.LEAST_SQUARES_SOLUTION
        else:
            assert solution.reason is Reason.RESIDUAL_TOLERANCE
        truth = pinv(A, damping) @ b
        assert float((solution.x - truth).norm()) <= 1e-6 * float(truth.norm())
        assert_fields(solution, A, b, damping)


# singular


@pytest.mark.parametrize("seed", range(10))  # a Cholesky factorisation of a singular matrix may succeed or fail
@pytest.mark.parametrize("deficit", [1, 10])
@pytest.mark.parametrize("consistent", [True, False])
@pytest.mark.parametrize("gram", [True, False])
def test_singular_matrices_give_the_least_norm_solution(seed: int, deficit: int, consistent: bool, gram: bool) -> None:
    n = 20
    if gram:
        J = torch.randn(n - deficit, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        A = J.T @ J
    else:
        A = with_eigenvalues(torch.cat([torch.logspace(0, -3, n - deficit), torch.zeros(deficit)]).double(), seed)
    b = A @ vector(n) if consistent else vector(n)
    solution = direct(A, b)
    truth = pinv(A) @ b
    assert float((solution.x - truth).norm()) <= 1e-8 * float(truth.norm())
    assert solution.reason is (Reason.RESIDUAL_TOLERANCE if consistent else Reason.LEAST_SQUARES_SOLUTION)
    assert solution.converged
    assert_fields(solution, A, b)
    if not consistent:
        assert float((A @ (b - A @ solution.x)).norm()) <= 1e-10 * float(A.norm() * b.norm())


@pytest.mark.parametrize("seed", range(6))
def test_singular_in_float32(seed: int) -> None:
    A = with_eigenvalues(torch.cat([torch.logspace(0, -1, 14), torch.zeros(1)]).double(), seed)
    truth = pinv(A) @ vector(15)
    solution = direct(A.float(), vector(15).float())
    assert solution.reason is Reason.LEAST_SQUARES_SOLUTION
    assert float((solution.x - truth).norm()) <= 1e-4 * float(truth.norm())


def test_damping_below_rounding_does_not_blow_up() -> None:
    A = with_eigenvalues(torch.cat([torch.logspace(0, -3, 15), torch.zeros(5)]).double())
    b = vector(20)
    solution = direct(A, b, damping=1e-19)
    truth = pinv(A) @ b
    assert float((solution.x - truth).norm()) <= 1e-8 * float(truth.norm())
    assert solution.reason is Reason.LEAST_SQUARES_SOLUTION


def test_zero_matrix() -> None:
    b = vector(4)
    zero = direct(torch.zeros(4, 4, dtype=torch.float64), b)
    assert zero.reason is Reason.LEAST_SQUARES_SOLUTION
    assert not zero.x.any()
    damped = direct(torch.zeros(4, 4, dtype=torch.float64), b, damping=0.5)
    assert damped.reason is Reason.RESIDUAL_TOLERANCE
    torch.testing.assert_close(damped.x, 2 * b)


# indefinite


@pytest.mark.parametrize("lowest", [-1e-6, -0.5, -1e3])
def test_indefinite_matrices_give_a_direction(lowest: float) -> None:
    A, b = with_eigenvalues(torch.cat([torch.tensor([lowest]), torch.logspace(-2, 0, 9)]).double()), vector(10)
    solution = direct(A, b)
    assert solution.reason is Reason.NEGATIVE_CURVATURE
    assert not solution.converged
    d = solution.direction
    assert float(d.norm()) == pytest.approx(1.0)
    torch.testing.assert_close(A @ d, float(d @ A @ d) * d, rtol=0.0, atol=1e-12 * max(1.0, -lowest))
    assert float(d @ A @ d) == pytest.approx(lowest, rel=1e-8)
    assert not solution.x.any()
    assert (solution.model, solution.true_residual_norm) == (0.0, pytest.approx(float(b.norm())))


@pytest.mark.parametrize("first", [None, 0.0])
def test_indefinite_but_damped_enough(first: float | None) -> None:
    A, b = with_eigenvalues(torch.tensor([-0.5, -0.3, 0.0, 1.0, 7.0]).double()), vector(5)
    system = Direct(A, b)
    if first is not None:
        assert system.solve(first).reason is Reason.NEGATIVE_CURVATURE
    solution = system.solve(0.6)
    assert solution.reason is Reason.RESIDUAL_TOLERANCE
    torch.testing.assert_close(solution.x, torch.linalg.solve(A + 0.6 * torch.eye(5).double(), b))
    assert_fields(solution, A, b, 0.6)


def test_negative_definite_but_damped_enough() -> None:
    A, b = -3.0 * torch.eye(6).double(), vector(6)
    solution = direct(A, b, damping=4.0)
    assert solution.reason is Reason.RESIDUAL_TOLERANCE
    torch.testing.assert_close(solution.x, b)


# sample space


def in_samples(R: Tensor, y: Tensor, c: Tensor | None = None, shift: float = 0.0) -> types.SimpleNamespace:
    """What a NormalMatrix holds in sample space."""
    c = torch.zeros(R.shape[1], dtype=R.dtype) if c is None else c
    return types.SimpleNamespace(matrix=R @ R.T, rows=R, right_rows=y, right=c, shift=shift, gradient=-(R.T @ y + c))


def rows(m: int, n: int, condition: float) -> Tensor:
    """m x n of this condition number."""
    k = min(m, n)
    return (orthogonal(m, 3)[:, :k] * torch.logspace(0, -math.log10(condition), k, dtype=torch.float64)) @ orthogonal(
        n, 4
    )[:, :k].T


def least_squares(R: Tensor, y: Tensor, c: Tensor, mu: float) -> Tensor:
    """argmin ½‖R x - y‖² - cᵀx + ½ mu ‖x‖², by numpy's lstsq of the stacked problem."""
    if mu == 0:
        return torch.from_numpy(np.linalg.lstsq(R.numpy(), y.numpy(), rcond=1e-12)[0])
    stacked = np.vstack([R.numpy(), math.sqrt(mu) * np.eye(R.shape[1])])
    return torch.from_numpy(np.linalg.lstsq(stacked, np.concatenate([y.numpy(), c.numpy() / math.sqrt(mu)]))[0])


@pytest.mark.parametrize(("m", "n"), [(8, 20), (20, 8), (1, 5)])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e5])
@pytest.mark.parametrize("damping", [0.0, 1e-6, 0.1])
@pytest.mark.parametrize("shift", [0.0, 0.01])
def test_sample_space(m: int, n: int, condition: float, damping: float, shift: float) -> None:
    R, y = rows(m, n, condition), vector(m)
    c = vector(n, 7) if shift else torch.zeros(n, dtype=torch.float64)
    solution = Direct(in_samples(R, y, c, shift)).solve(damping)
    truth = least_squares(R, y, c, damping + shift)
    assert solution.reason is Reason.RESIDUAL_TOLERANCE
    if m <= n or damping + shift > 0 or condition < 1e4:  # else too small for K's precision
        assert float((solution.x - truth).norm()) <= 1e-7 * float(truth.norm())
    assert_fields(solution, R.T @ R, R.T @ y + c, damping + shift)


@pytest.mark.parametrize("condition", [1e6, 1e7])
@pytest.mark.parametrize("damping", [0.0, 1e-12, 1e-8])
def test_ill_conditioned_rows_are_solved_to_a_small_residual(condition: float, damping: float) -> None:
    R, y = rows(20, 50, condition), vector(20)
    solution = Direct(in_samples(R, y)).solve(damping)
    assert solution.reason is Reason.RESIDUAL_TOLERANCE
    truth = least_squares(R, y, torch.zeros(50).double(), damping)
    assert float((solution.x - truth).norm()) <= 1e-6 * float(truth.norm())


def test_repeated_rows_are_singular_and_consistent() -> None:
    R, y = rows(5, 12, 10.0).repeat(2, 1), vector(10)
    for damping in (0.0, 1e-3, 0.0):
        solution = Direct(in_samples(R, y)).solve(damping)
        truth = least_squares(R, y, torch.zeros(12).double(), damping)
        assert solution.reason is Reason.RESIDUAL_TOLERANCE
        assert float((solution.x - truth).norm()) <= 1e-9 * float(truth.norm())


# reasons and arguments


def test_zero_right_hand_side() -> None:
    solution = direct(spd(4, 10.0), torch.zeros(4, dtype=torch.float64), damping=1.0)
    assert solution.reason is Reason.ZERO_RIGHT_HAND_SIDE
    assert not solution.x.any()
    assert (solution.iterations, solution.model, solution.true_residual_norm) == (0, 0.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["matrix", "right-hand side"])
def test_non_finite(bad: float, where: str) -> None:
    A, b = spd(4, 10.0), vector(4)
    if where == "matrix":
        A[1, 2] = bad
    else:
        b[1] = bad
    solution = direct(A, b)
    assert solution.reason is Reason.NON_FINITE
    assert not solution.x.any()


def test_a_matrix_that_is_not_symmetric_loses_accuracy() -> None:
    A = spd(6, 10.0) + torch.triu(torch.ones(6, 6).double(), 1)
    solution = direct(A, vector(6))
    assert solution.reason is Reason.ACCURACY_LOST
    assert solution.true_residual_norm == pytest.approx(float((vector(6) - A @ solution.x).norm()))


@pytest.mark.parametrize(
    ("A", "b", "words"),
    [
        (torch.ones(4, 3), torch.ones(4), r"square matrix, got a tensor of shape \(4, 3\)"),
        (torch.ones(4), torch.ones(4), r"square matrix, got a tensor of shape \(4,\)"),
        (torch.eye(4), None, r"needs b to match, got none"),
        (torch.eye(4), torch.ones(3), r"shape \(4, 4\) needs b to match, got torch.float32 of shape \(3,\)"),
        (torch.eye(4), torch.ones(4, 1), r"got torch.float32 of shape \(4, 1\)"),
        (torch.eye(4), torch.ones(4).double(), "got torch.float64"),
        (in_samples(torch.eye(2), torch.ones(2)), torch.ones(2), "own right-hand side"),
    ],
)
def test_systems_that_do_not_fit(A: object, b: Tensor | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Direct(A, b)


@pytest.mark.parametrize("damping", [-1e-3, math.nan, math.inf])
def test_damping_out_of_range(damping: float) -> None:
    with pytest.raises(ValueError, match=f"damping must be finite and not negative, got {damping}"):
        direct(torch.eye(2), torch.ones(2), damping=damping)
