"""cg on explicit matrices: solutions, histories, and every reason for which it ends."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dhf import Reason, cg
from tests.solvers.systems import Counting, NanAt, model, spd, vector

# solutions


@given(n=st.integers(1, 40), condition=st.floats(1, 1e4), seed=st.integers(0, 1000))
def test_solves_positive_definite_systems(n: int, condition: float, seed: int) -> None:
    A, b = spd(n, condition, seed), vector(n, seed + 1)
    solution = cg(A, b, rtol=1e-10)
    assert solution.reason is Reason.RESIDUAL_TOLERANCE
    assert solution.converged
    error = torch.linalg.vector_norm(solution.x - torch.linalg.solve(A, b))
    assert float(error) <= 2e-10 * condition * float(b.norm())
    assert solution.true_residual_norm == pytest.approx(float((b - A @ solution.x).norm()), rel=1e-6, abs=1e-15)


def test_float32() -> None:
    A, b = spd(30).float(), vector(30).float()
    solution = cg(A, b, rtol=1e-5)
    assert solution.x.dtype == torch.float32
    assert solution.reason is Reason.RESIDUAL_TOLERANCE
    torch.testing.assert_close(solution.x, torch.linalg.solve(A, b), rtol=1e-3, atol=1e-4)


def test_takes_the_iterations_that_scipy_takes() -> None:
    A, b = spd(50, 20.0), vector(50)
    iterates: list[np.ndarray] = []
    x, failed = scipy.sparse.linalg.cg(A.numpy(), b.numpy(), rtol=1e-8, callback=lambda xk: iterates.append(xk.copy()))
    assert not failed
    solution = cg(A, b, rtol=1e-8, snapshot_ratio=1.0001)
    assert solution.iterations == len(iterates)
    for kept in solution.iterates:
        torch.testing.assert_close(kept.x, torch.from_numpy(iterates[kept.number - 1]), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(solution.x, torch.from_numpy(x), rtol=1e-6, atol=1e-8)


def test_one_product_per_iteration_and_one_for_the_true_residual() -> None:
    A, b = Counting(spd(20)), vector(20)
    assert A.products == 0
    solution = cg(A, b)
    assert A.products == solution.iterations + 1


@pytest.mark.parametrize("form", ["tensor", "matvec", "matmul"])
def test_operators_of_any_form(form: str) -> None:
    A, b = spd(5), vector(5)

    class WithMatmul:
        def __matmul__(self, v: Tensor) -> Tensor:
            return A @ v

    operator = {"tensor": A, "matvec": Counting(A), "matmul": WithMatmul()}[form]
    torch.testing.assert_close(cg(operator, b, rtol=1e-12).x, torch.linalg.solve(A, b))


def test_identity_that_returns_its_argument() -> None:
    class Identity:
        def matvec(self, v: Tensor) -> Tensor:
            return v

    b = vector(5)
    solution = cg(Identity(), b, x0=vector(5, 2))
    torch.testing.assert_close(solution.x, b)
    assert torch.equal(b, vector(5))


def test_preconditioner_by_the_inverse_takes_one_iteration() -> None:
    A, b = spd(20, 1e6), vector(20)
    inverse = torch.linalg.inv(A)
    solution = cg(A, b, rtol=1e-8, preconditioner=lambda r: inverse @ r)
    assert solution.iterations == 1
    torch.testing.assert_close(solution.x, torch.linalg.solve(A, b), rtol=1e-6, atol=1e-9)


def test_preconditioner_takes_the_iterations_of_the_transformed_system() -> None:
    scale = torch.logspace(0, 4, 40, dtype=torch.float64)
    A, b = scale[:, None].sqrt() * spd(40, 10.0) * scale.sqrt(), vector(40)
    plain, preconditioned = cg(A, b, rtol=1e-8), cg(A, b, rtol=1e-8, preconditioner=lambda r: r / scale)
    truth, failed = scipy.sparse.linalg.cg(A.numpy(), b.numpy(), rtol=1e-8, M=np.diag(1 / scale.numpy()))
    assert not failed
    assert preconditioned.iterations < plain.iterations / 2
    assert preconditioned.reason is Reason.RESIDUAL_TOLERANCE
    torch.testing.assert_close(preconditioned.x, torch.from_numpy(truth), rtol=1e-6, atol=1e-9)


def test_warm_start_at_the_solution_takes_no_iteration() -> None:
    A, b = spd(10), vector(10)
    solution = cg(A, b, x0=torch.linalg.solve(A, b), rtol=1e-10)
    assert solution.reason is Reason.RESIDUAL_TOLERANCE
    assert solution.iterations == 0
    assert solution.model == pytest.approx(-0.5 * float(b @ torch.linalg.solve(A, b)), rel=1e-9)


def test_warm_start_solves_and_leaves_x0_alone() -> None:
    A, b, x0 = spd(10), vector(10), vector(10, 3)
    kept = x0.clone()
    solution = cg(A, b, x0=x0, rtol=1e-12)
    torch.testing.assert_close(solution.x, torch.linalg.solve(A, b))
    assert torch.equal(x0, kept)
    assert solution.history[0].residual_norm == pytest.approx(float((b - A @ x0).norm()))


# history, model, snapshots


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_history_is_that_of_the_iterates(warm: bool, preconditioned: bool) -> None:
    A, b = spd(25, 1e3), vector(25)
    solution = cg(
        A,
        b,
        x0=vector(25, 5) if warm else None,
        rtol=1e-8,
        snapshot_ratio=1.0001,
        preconditioner=(lambda r: r / A.diagonal()) if preconditioned else None,
    )
    assert [i.number for i in solution.history] == list(range(solution.iterations + 1))
    assert [i.number for i in solution.iterates] == list(range(1, solution.iterations + 1))
    first = solution.history[0]
    assert math.isnan(first.curvature)
    if not warm:
        assert (first.residual_norm, first.model) == (pytest.approx(float(b.norm())), 0.0)
    for kept, line in zip(solution.iterates, solution.history[1:], strict=True):
        assert line.model == kept.model == pytest.approx(model(A, b, kept.x), rel=1e-9, abs=1e-9)
        assert line.residual_norm == pytest.approx(float((b - A @ kept.x).norm()), rel=1e-6, abs=1e-9)
    for (before, kept), line in zip(itertools.pairwise(solution.iterates), solution.history[2:], strict=True):
        d = kept.x - before.x
        assert line.curvature == pytest.approx(float(d @ A @ d / (d @ d)), rel=1e-5)
    assert solution.model == solution.history[-1].model
    assert solution.residual_norm == solution.history[-1].residual_norm


def test_model_decreases() -> None:
    models = [i.model for i in cg(spd(30, 1e4), vector(30), rtol=1e-6).history]
    assert all(later < earlier for earlier, later in itertools.pairwise(models))


def test_snapshots_are_geometric_and_few() -> None:
    A, b = spd(300, 1e6), vector(300)
    solution = cg(A, b, rtol=1e-9, snapshot_ratio=1.3)
    numbers = [i.number for i in solution.iterates]
    assert numbers[-1] == solution.iterations > 200
    assert torch.equal(solution.iterates[-1].x, solution.x)
    assert len(numbers) <= 2 + math.log(solution.iterations) / math.log(1.3)
    assert all(1.15 < later / earlier < 1.45 for earlier, later in itertools.pairwise(numbers[6:-1]))
    for kept in solution.iterates:
        assert kept.model == pytest.approx(model(A, b, kept.x), rel=1e-6)


def test_no_snapshots_unless_asked_for() -> None:
    assert cg(spd(10), vector(10)).iterates == []


def test_callback_sees_every_line() -> None:
    seen: list[Any] = []
    solution = cg(spd(10), vector(10), callback=seen.append)
    assert [line.number for line in seen] == list(range(solution.iterations + 1))
    assert seen[1:] == solution.history[1:]


# reasons


def test_zero_right_hand_side() -> None:
    A = Counting(spd(4))
    solution = cg(A, torch.zeros(4, dtype=torch.float64), x0=vector(4))
    assert solution.reason is Reason.ZERO_RIGHT_HAND_SIDE
    assert not solution.x.any()
    assert (solution.iterations, solution.model, solution.true_residual_norm, A.products) == (0, 0.0, 0.0, 0)


@pytest.mark.parametrize("start", ["cold", "warm"])
def test_negative_curvature_in_the_first_direction(start: str) -> None:
    A = torch.diag(torch.tensor([1.0, -2.0], dtype=torch.float64))
    b = torch.tensor([0.0, 1.0], dtype=torch.float64)
    x0 = torch.tensor([0.5, 0.0], dtype=torch.float64) if start == "warm" else None
    solution = cg(A, b, x0=x0)
    assert solution.reason is Reason.NEGATIVE_CURVATURE
    assert solution.iterations == 0
    assert torch.equal(solution.x, torch.zeros_like(b) if x0 is None else x0)
    assert float(solution.direction @ A @ solution.direction) < 0
    assert solution.true_residual_norm == pytest.approx(float((b - A @ solution.x).norm()))
    assert solution.model == pytest.approx(model(A, b, solution.x))


@given(seed=st.integers(0, 500))
def test_indefinite_matrices_end_at_the_first_bad_direction(seed: int) -> None:
    n = 12
    A, b = spd(n, 50.0, seed), vector(n, seed + 1)
    lowest = torch.linalg.eigh(A)
    A = A - 1.5 * torch.outer(lowest.eigenvectors[:, 0], lowest.eigenvectors[:, 0])  # one eigenvalue of -1/2
    solution = cg(A, b, rtol=1e-13, snapshot_ratio=1.0001)
    assert solution.reason is Reason.NEGATIVE_CURVATURE
    d = solution.direction
    assert float(d @ A @ d) <= 0
    assert all(i.curvature > 0 for i in solution.history[1:-1])
    assert solution.history[-1].curvature <= 0
    assert solution.history[-1].curvature == pytest.approx(float(d @ A @ d / (d @ d)), rel=1e-6)
    assert solution.iterations == len(solution.history) - 2
    assert solution.model == pytest.approx(model(A, b, solution.x), rel=1e-8, abs=1e-10)
    assert solution.iterates[-1].number == solution.iterations
    assert torch.equal(solution.iterates[-1].x, solution.x)


def test_zero_matrix_is_not_positive() -> None:
    solution = cg(torch.zeros(3, 3, dtype=torch.float64), vector(3))
    assert solution.reason is Reason.NEGATIVE_CURVATURE
    assert not solution.x.any()
    assert torch.equal(solution.direction, vector(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_curvature_is_judged_whatever_the_scale(dtype: torch.dtype, scale: float) -> None:
    positive, b = spd(10, 10.0), vector(10)
    assert cg((scale * positive).to(dtype), b.to(dtype), rtol=1e-4).reason is Reason.RESIDUAL_TOLERANCE
    assert cg((scale * positive).to(dtype), (1e-10 * b).to(dtype), rtol=1e-4).reason is Reason.RESIDUAL_TOLERANCE
    negative = cg((-scale * positive).to(dtype), b.to(dtype), rtol=1e-4)
    assert negative.reason is Reason.NEGATIVE_CURVATURE
    assert negative.iterations == 0


@pytest.mark.parametrize("where", ["everywhere", "one entry"])
def test_nan_in_the_matrix(where: str) -> None:
    A = spd(6)
    A[2, 3] = math.nan
    if where == "everywhere":
        A[:] = math.nan
    counting = Counting(A)
    solution = cg(counting, vector(6))
    assert solution.reason is Reason.NON_FINITE
    assert counting.products <= 2
    assert solution.iterations == 0
    assert not solution.x.any()


def test_nan_that_comes_later_leaves_the_last_good_iterate() -> None:
    A, b = spd(10, 1e3), vector(10)
    solution = cg(NanAt(A, 4), b)
    assert solution.reason is Reason.NON_FINITE
    assert solution.iterations == 3
    torch.testing.assert_close(solution.x, cg(A, b, max_iterations=3).x)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_right_hand_side(bad: float) -> None:
    b = vector(4)
    b[1] = bad
    assert cg(spd(4), b).reason is Reason.NON_FINITE


def test_indefinite_preconditioner() -> None:
    A, b = spd(6), vector(6)
    first = cg(A, b, preconditioner=lambda r: -r)
    assert first.reason is Reason.INDEFINITE_PRECONDITIONER
    assert (first.iterations, first.x.any().item()) == (0, False)
    signs = torch.tensor([1.0, 1, 1, 1, 1, -1], dtype=torch.float64)
    later = cg(A, torch.ones(6, dtype=torch.float64), rtol=1e-12, preconditioner=lambda r: signs * r)
    assert later.reason in (Reason.INDEFINITE_PRECONDITIONER, Reason.NEGATIVE_CURVATURE)


def test_nan_from_the_preconditioner() -> None:
    assert cg(spd(6), vector(6), preconditioner=lambda r: r * math.nan).reason is Reason.NON_FINITE


def test_accuracy_lost_in_float32() -> None:
    A, b = spd(100, 1e6).float(), vector(100).float()
    solution = cg(A, b, rtol=2e-7, max_iterations=100_000)
    assert solution.reason is Reason.ACCURACY_LOST
    assert not solution.converged
    assert solution.residual_norm <= 2e-7 * float(b.norm())
    assert solution.true_residual_norm > 4e-7 * float(b.norm())
    exact = torch.linalg.vector_norm(b.double() - A.double() @ solution.x.double())
    assert solution.true_residual_norm == pytest.approx(float(exact), rel=0.5)


def test_iteration_limit() -> None:
    A, b = spd(30, 1e4), vector(30)
    solution = cg(A, b, rtol=1e-10, max_iterations=5)
    assert solution.reason is Reason.ITERATION_LIMIT
    assert solution.iterations == 5
    assert solution.true_residual_norm == pytest.approx(solution.residual_norm, rel=1e-9)
    none = cg(A, b, max_iterations=0)
    assert (none.reason, none.iterations, none.true_residual_norm) == (
        Reason.ITERATION_LIMIT,
        0,
        pytest.approx(float(b.norm())),
    )


def test_default_iteration_limit_is_ten_times_the_size() -> None:
    solution = cg(spd(5, 1e13), vector(5), rtol=1e-15)
    assert solution.reason is Reason.ITERATION_LIMIT
    assert solution.iterations == 50


def test_absolute_tolerance() -> None:
    A, b = spd(30, 1e4), vector(30)
    solution = cg(A, b, rtol=0.0, atol=1e-3)
    assert solution.reason is Reason.RESIDUAL_TOLERANCE
    assert solution.residual_norm <= 1e-3 < solution.history[-2].residual_norm


def test_relative_progress_is_martens_rule() -> None:
    A, b = spd(200, 1e6), vector(200)
    tolerance = 5e-4
    models = [i.model for i in cg(A, b, rtol=1e-9).history]

    def stalls(k: int) -> bool:
        window = max(10, k // 10)
        return k > window and models[k] < 0 and (models[k] - models[k - window]) / models[k] < window * tolerance

    first = next(k for k in range(len(models)) if stalls(k))
    solution = cg(A, b, rtol=1e-9, progress_tolerance=tolerance)
    assert solution.reason is Reason.RELATIVE_PROGRESS
    assert solution.converged
    assert solution.iterations == first > 11


def test_every_reason_has_advice() -> None:
    for reason in Reason:
        assert reason.advice.endswith(".")
        assert reason.converged == (reason > 0)
        assert reason.words == reason.name.lower().replace("_", " ")


# arguments


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rtol": -1e-3}, "rtol must be in"),
        ({"rtol": 1.0}, "rtol must be in"),
        ({"rtol": math.nan}, "rtol must be in"),
        ({"atol": -1.0}, "atol not negative"),
        ({"max_iterations": -1}, "max_iterations must not be negative"),
        ({"progress_tolerance": 0.0}, "progress_tolerance must be positive"),
        ({"snapshot_ratio": 1.0}, "snapshot_ratio must be above 1"),
        ({"x0": torch.zeros(3, dtype=torch.float64)}, r"x0 is torch.float64 of shape \(3,\)"),
        ({"x0": torch.zeros(4)}, "x0 is torch.float32"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cg(spd(4), vector(4), **options)


@pytest.mark.parametrize(
    ("A", "b", "words"),
    [
        (torch.eye(4), torch.ones(3), r"operator has shape \(4, 4\), the right-hand side \(3,\)"),
        (torch.eye(4), torch.ones(4, 1), r"shape \(n,\), got \(4, 1\)"),
        (torch.eye(4), torch.ones(4, dtype=torch.long), "must be float32 or float64, got torch.int64"),
        (torch.eye(4), torch.ones(4, dtype=torch.float64), "dtype is torch.float32"),
        (torch.ones(4, 3), torch.ones(4), "(4, 3)"),
    ],
)
def test_systems_that_do_not_fit(A: Tensor, b: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cg(A, b)


def test_an_object_that_cannot_multiply() -> None:
    with pytest.raises(TypeError, match="neither matvec"):
        cg(object(), vector(3))
    with pytest.raises(TypeError, match=r"a NumPy array cannot be an operator; use torch.as_tensor\(A\)"):
        cg(np.eye(3), vector(3))


def test_a_right_hand_side_that_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="the right-hand side must be a tensor, got ndarray"):
        cg(torch.eye(3), np.ones(3))  # type: ignore[arg-type]


def test_a_preconditioner_that_is_not_a_function_is_refused() -> None:
    with pytest.raises(TypeError, match="preconditioner must be a function of r, got Tensor"):
        cg(torch.eye(2), torch.ones(2), preconditioner=torch.ones(2))
