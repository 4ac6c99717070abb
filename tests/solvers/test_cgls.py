"""cgls on explicit matrices: solutions against numpy's lstsq, accuracy beside cg, histories, and every reason."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dhf import Reason, UsageError, cg
from dhf.solvers import cgls

CONDITIONS = [1.0, 1e2, 1e4, 1e6, 1e8, 1e10]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_singular_values(m: int, n: int, values: Tensor, seed: int = 0) -> Tensor:
    """m x n with these singular values."""
    k = len(values)
    U, V = torch.linalg.qr(randn(m, k, seed=seed))[0], torch.linalg.qr(randn(n, k, seed=seed + 1))[0]
    return (U * values) @ V.T


def conditioned(m: int, n: int, condition: float, seed: int = 0) -> Tensor:
    values = torch.logspace(0, -math.log10(condition), min(m, n), dtype=torch.float64)
    return with_singular_values(m, n, values, seed)


def lstsq(J: Tensor, b: Tensor, damping: float = 0.0) -> Tensor:
    """The least-norm minimiser, by numpy."""
    n = J.shape[1]
    stacked = np.vstack([J.numpy(), math.sqrt(damping) * np.eye(n)]), np.concatenate([b.numpy(), np.zeros(n)])
    return torch.from_numpy(np.linalg.lstsq(*stacked, rcond=1e-13)[0])


def model(J: Tensor, b: Tensor, x: Tensor, damping: float = 0.0) -> float:
    Jx = J @ x
    return float(0.5 * Jx @ Jx + 0.5 * damping * x @ x - b @ Jx)


def gradient_norm(J: Tensor, b: Tensor, x: Tensor, damping: float = 0.0) -> float:
    return float((J.T @ (b - J @ x) - damping * x).norm())


def error(x: Tensor, truth: Tensor) -> float:
    return float((x - truth).norm() / truth.norm())


# solutions


@given(m=st.integers(1, 30), n=st.integers(1, 30), condition=st.floats(1, 1e3), seed=st.integers(0, 1000))
def test_solves_least_squares_problems_of_any_shape(m: int, n: int, condition: float, seed: int) -> None:
    J, b = conditioned(m, n, condition, seed), randn(m, seed=seed + 2)
    solution = cgls(J, b, rtol=1e-12)
    assert solution.reason is Reason.RESIDUAL_TOLERANCE
    assert solution.true_residual_norm <= 2e-12 * float((J.T @ b).norm())
    # ‖x - x*‖ ≤ ‖JᵀJ(x - x*)‖ / σ²; with fewer rows than columns x stays in their span
    assert float((solution.x - lstsq(J, b)).norm()) <= 1e-11 * condition**2 * float(b.norm())


@pytest.mark.parametrize("condition", CONDITIONS)
def test_attains_the_accuracy_that_the_condition_of_J_allows(condition: float) -> None:
    J, b = conditioned(30, 12, condition), randn(30, seed=5)
    solution = cgls(J, b, rtol=1e-14, max_iterations=1000)
    # cg on JᵀJ would lose condition², all digits from 1e8 on
    assert error(solution.x, lstsq(J, b)) <= 1e-14 * condition + 1e-13
    r = b - J @ solution.x
    assert float(r.norm()) <= float((b - J @ lstsq(J, b)).norm()) + 1e-15 * float(solution.x.norm()) + 1e-12


@pytest.mark.parametrize("condition", [1e5, 1e6, 1e7])
@pytest.mark.parametrize("seed", range(3))
def test_more_accurate_than_cg_on_the_normal_equations(condition: float, seed: int) -> None:
    J, b = conditioned(30, 12, condition, seed), randn(30, seed=seed + 5)
    truth = lstsq(J, b)
    with_rows = cgls(J, b, rtol=1e-13, max_iterations=1000)
    without = cg(J.T @ J, J.T @ b, rtol=1e-13, max_iterations=1000)
    assert error(with_rows.x, truth) < 0.05 * error(without.x, truth)


@pytest.mark.parametrize(("m", "n"), [(30, 12), (8, 12), (12, 12)])
def test_rank_deficient_problems_give_the_least_norm_solution(m: int, n: int) -> None:
    J, b = with_singular_values(m, n, torch.logspace(0, -2, 5, dtype=torch.float64)), randn(m, seed=2)
    solution = cgls(J, b, rtol=1e-12)
    assert solution.reason is Reason.RESIDUAL_TOLERANCE
    assert error(solution.x, lstsq(J, b)) < 1e-8


def test_columns_of_zeros() -> None:
    J, b = conditioned(10, 4, 10.0), randn(10, seed=2)
    J[:, 1] = 0.0
    solution = cgls(J, b, rtol=1e-12)
    assert solution.x[1] == 0.0
    assert error(solution.x, lstsq(J, b)) < 1e-9


@pytest.mark.parametrize("damping", [1e-8, 1e-3, 10.0])
@pytest.mark.parametrize(("m", "n"), [(30, 12), (8, 12)])
def test_damping(damping: float, m: int, n: int) -> None:
    J, b = conditioned(m, n, 1e4), randn(m, seed=2)
    solution = cgls(J, b, damping=damping, rtol=1e-12, max_iterations=500)
    assert solution.reason is Reason.RESIDUAL_TOLERANCE
    assert error(solution.x, lstsq(J, b, damping)) < 1e-6
    assert solution.true_residual_norm == pytest.approx(gradient_norm(J, b, solution.x, damping), rel=1e-2, abs=1e-15)
    assert solution.model == pytest.approx(model(J, b, solution.x, damping), rel=1e-9)


def test_float32() -> None:
    J, b = conditioned(30, 12, 100.0), randn(30, seed=2)
    solution = cgls(J.float(), b.float(), rtol=1e-5)
    assert solution.x.dtype == torch.float32
    assert solution.reason is Reason.RESIDUAL_TOLERANCE
    assert error(solution.x.double(), lstsq(J, b)) < 1e-3


def test_preconditioner_by_the_inverse_takes_one_iteration() -> None:
    J, b = conditioned(30, 12, 1e3), randn(30, seed=2)
    inverse = torch.linalg.inv(J.T @ J + 0.01 * torch.eye(12).double())
    solution = cgls(J, b, damping=0.01, rtol=1e-8, preconditioner=lambda r: inverse @ r)
    assert solution.iterations == 1
    assert error(solution.x, lstsq(J, b, 0.01)) < 1e-8


def test_preconditioner_undoes_the_scaling_of_columns() -> None:
    scale = torch.logspace(-3, 3, 12, dtype=torch.float64)
    plain, b = conditioned(30, 12, 5.0), randn(30, seed=2)
    J = plain * scale
    truth = lstsq(plain, b) / scale
    solution = cgls(J, b, rtol=1e-12, preconditioner=lambda r: r / scale.square())
    assert solution.converged
    assert error(solution.x * scale, truth * scale) < 1e-7
    without = cgls(J, b, rtol=1e-12, max_iterations=1000)
    assert solution.iterations < 0.7 * without.iterations
    assert error(solution.x * scale, truth * scale) < 1e-2 * error(without.x * scale, truth * scale)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_warm_start(preconditioned: bool) -> None:
    J, b, x0 = conditioned(30, 12, 1e4), randn(30, seed=2), randn(12, seed=3)
    kept = x0.clone()
    options: dict[str, Any] = {"preconditioner": lambda r: r / (J.square().sum(0) + 1e-3)} if preconditioned else {}
    solution = cgls(J, b, x0=x0, rtol=1e-13, max_iterations=500, **options)
    assert error(solution.x, lstsq(J, b)) < 1e-7
    assert torch.equal(x0, kept)
    assert solution.history[0].residual_norm == pytest.approx(gradient_norm(J, b, x0))
    assert solution.history[0].model == pytest.approx(model(J, b, x0))
    assert solution.model == pytest.approx(model(J, b, solution.x), rel=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_a_large_start_costs_no_digits(seed: int) -> None:
    """Its rounding stays in a residual that is carried on; one taken anew from rows is rid of it."""
    J, b, x0 = conditioned(30, 12, 1e6, seed), randn(30, seed=seed + 5), 1e4 * randn(12, seed=4)
    solution = cgls(J, b, x0=x0, rtol=1e-12, max_iterations=500)
    assert error(solution.x, lstsq(J, b)) < 5e-9


def test_warm_start_keeps_what_no_row_sees() -> None:
    J, b, x0 = conditioned(5, 9, 10.0), randn(5, seed=2), randn(9, seed=3)
    solution = cgls(J, b, x0=x0, rtol=1e-12)
    unseen = torch.eye(9).double() - torch.linalg.pinv(J) @ J
    torch.testing.assert_close(solution.x, lstsq(J, b) + unseen @ x0, rtol=1e-9, atol=1e-10)


def test_warm_start_at_the_solution_takes_no_iteration() -> None:
    J, b = conditioned(30, 12, 10.0), randn(30, seed=2)
    truth = lstsq(J, b, 0.1)
    solution = cgls(J, b, damping=0.1, x0=truth, rtol=1e-10)
    assert (solution.reason, solution.iterations) == (Reason.RESIDUAL_TOLERANCE, 0)
    assert torch.equal(solution.x, truth)
    assert solution.model == pytest.approx(model(J, b, truth, 0.1), rel=1e-12)
    assert solution.true_residual_norm == pytest.approx(gradient_norm(J, b, truth, 0.1), abs=1e-14)


# history


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_history_is_that_of_the_iterates(warm: bool, preconditioned: bool, damping: float) -> None:
    J, b = conditioned(40, 25, 50.0), randn(40, seed=2)
    solution = cgls(
        J,
        b,
        damping=damping,
        x0=randn(25, seed=4) if warm else None,
        rtol=1e-8,
        snapshot_ratio=1.0001,
        preconditioner=(lambda r: r / (J.square().sum(0) + damping)) if preconditioned else None,
    )
    numbers = [line.number for line in solution.history]
    assert numbers == list(range(solution.iterations + 1))
    assert [i.number for i in solution.iterates] == numbers[1:]
    for kept, line in zip(solution.iterates, solution.history[1:], strict=True):
        assert line.model == kept.model == pytest.approx(model(J, b, kept.x, damping), rel=1e-9, abs=1e-9)
        assert line.residual_norm == pytest.approx(gradient_norm(J, b, kept.x, damping), rel=1e-5, abs=1e-11)
    for (before, kept), line in zip(itertools.pairwise(solution.iterates), solution.history[2:], strict=True):
        d = kept.x - before.x
        if float(d.norm()) > 1e-6:
            curvature = float((J @ d).square().sum() / d.square().sum()) + damping
            assert line.curvature == pytest.approx(curvature, rel=1e-4)
    assert torch.equal(solution.iterates[-1].x, solution.x)
    assert (solution.model, solution.residual_norm) == (
        solution.history[-1].model,
        solution.history[-1].residual_norm,
    )
    assert solution.true_residual_norm == pytest.approx(gradient_norm(J, b, solution.x, damping), rel=1e-3, abs=1e-13)


def test_model_decreases() -> None:
    models = [line.model for line in cgls(conditioned(40, 25, 1e3), randn(40, seed=2), rtol=1e-6).history]
    assert all(later < earlier for earlier, later in itertools.pairwise(models))


def test_callback_sees_every_line() -> None:
    seen: list[Any] = []
    solution = cgls(conditioned(20, 10, 100.0), randn(20, seed=2), callback=seen.append)
    assert [line.number for line in seen] == list(range(solution.iterations + 1))
    assert seen[1:] == solution.history[1:]
    assert solution.iterates == []


# reasons


@pytest.mark.parametrize("zero", ["J", "b"])
def test_zero_right_hand_side(zero: str) -> None:
    J, b = conditioned(6, 4, 10.0), randn(6, seed=2)
    (J if zero == "J" else b).zero_()
    solution = cgls(J, b, x0=randn(4, seed=3))
    assert solution.reason is Reason.ZERO_RIGHT_HAND_SIDE
    assert not solution.x.any()
    assert (solution.iterations, solution.model, solution.true_residual_norm) == (0, 0.0, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["J", "b"])
def test_non_finite(bad: float, where: str) -> None:
    J, b = conditioned(6, 4, 10.0), randn(6, seed=2)
    if where == "J":
        J[2, 1] = bad
    else:
        b[2] = bad
    solution = cgls(J, b)
    assert solution.reason is Reason.NON_FINITE
    assert solution.iterations == 0
    assert not solution.x.any()


def test_iteration_limit() -> None:
    J, b = conditioned(40, 25, 1e3), randn(40, seed=2)
    solution = cgls(J, b, rtol=1e-10, max_iterations=5)
    assert (solution.reason, solution.iterations) == (Reason.ITERATION_LIMIT, 5)
    assert solution.true_residual_norm == pytest.approx(gradient_norm(J, b, solution.x))
    assert solution.true_residual_norm == pytest.approx(solution.residual_norm, rel=1e-9)
    none = cgls(J, b, max_iterations=0)
    assert (none.reason, none.iterations) == (Reason.ITERATION_LIMIT, 0)
    assert not none.x.any()


def test_absolute_tolerance() -> None:
    J, b = conditioned(40, 25, 1e3), randn(40, seed=2)
    solution = cgls(J, b, rtol=0.0, atol=1e-3)
    assert solution.reason is Reason.RESIDUAL_TOLERANCE
    assert solution.residual_norm <= 1e-3 < solution.history[-2].residual_norm


def test_relative_progress() -> None:
    J, b = conditioned(200, 150, 1e4), randn(200, seed=2)
    models = [line.model for line in cgls(J, b, rtol=1e-9).history]

    def stalls(k: int) -> bool:
        window = max(10, k // 10)
        return k > window and models[k] < 0 and (models[k] - models[k - window]) / models[k] < window * 5e-4

    solution = cgls(J, b, rtol=1e-9, progress_tolerance=5e-4)
    assert solution.reason is Reason.RELATIVE_PROGRESS
    assert solution.iterations == next(k for k in range(len(models)) if stalls(k))


def test_accuracy_lost_in_float32() -> None:
    J, b = conditioned(60, 40, 1e3).float(), randn(60, seed=2).float()
    with pytest.warns(UserWarning, match="rtol=1e-09 is below what float32 can reach"):
        solution = cgls(J, b, rtol=1e-9, max_iterations=10_000)
    assert solution.reason is Reason.ACCURACY_LOST
    exact = gradient_norm(J.double(), b.double(), solution.x.double())
    assert exact > 2e-9 * float((J.T @ b).norm())
    assert solution.true_residual_norm > 2e-9 * float((J.T @ b).norm())


def test_indefinite_preconditioner() -> None:
    solution = cgls(conditioned(6, 4, 10.0), randn(6, seed=2), preconditioner=lambda r: -r)
    assert (solution.reason, solution.iterations) == (Reason.INDEFINITE_PRECONDITIONER, 0)
    assert not solution.x.any()


def test_nan_from_the_preconditioner() -> None:
    J, b = conditioned(6, 4, 10.0), randn(6, seed=2)
    assert cgls(J, b, preconditioner=lambda r: r * math.nan).reason is Reason.NON_FINITE


# arguments


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"damping": -1e-3}, "damping must be finite and not negative, got -0.001"),
        ({"damping": math.nan}, "damping must be finite and not negative, got nan"),
        ({"damping": math.inf}, "damping must be finite and not negative, got inf"),
        ({"rtol": -1e-3}, "rtol must be in"),
        ({"atol": -1.0}, "atol not negative"),
        ({"max_iterations": -1}, "max_iterations must not be negative"),
        ({"progress_tolerance": 0.0}, "progress_tolerance must be positive"),
        ({"snapshot_ratio": 1.0}, "snapshot_ratio must be above 1"),
        ({"x0": torch.zeros(3).double()}, r"x0 must be torch.float64 of shape \(4,\) on cpu, got torch.float64 \(3,\)"),
        ({"x0": torch.zeros(4)}, r"x0 must be torch.float64 of shape \(4,\) on cpu, got torch.float32"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cgls(conditioned(6, 4, 10.0), randn(6, seed=2), **options)


@pytest.mark.parametrize(
    ("J", "b", "words"),
    [
        (torch.ones(5, 3), torch.ones(3), r"J torch.float32 of shape \(5, 3\) needs b with one number per row.*\(3,\)"),
        (torch.ones(5, 3), torch.ones(5, 1), r"needs b with one number per row.*\(5, 1\)"),
        (torch.ones(5, 3), torch.ones(5).double(), "needs b with one number per row.*float64"),
        (torch.ones(5, 3), None, "needs b with one number per row, got None"),
        (torch.ones(5), torch.ones(5), r"of shape \(5,\) needs b"),
        (torch.ones(5, 3, dtype=torch.long), torch.ones(5, dtype=torch.long), "float32 or float64, got torch.int64"),
    ],
)
def test_systems_that_do_not_fit(J: Tensor, b: Tensor | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cgls(J, b)


def test_an_object_without_rows() -> None:
    with pytest.raises(UsageError, match=r"needs the rows.*object has none; use dhf.ResidualJacobian"):
        cgls(object())


def test_a_preconditioner_that_is_not_a_function_is_refused() -> None:
    with pytest.raises(TypeError, match="preconditioner must be a function of r, got Tensor"):
        cgls(torch.eye(2), torch.ones(2), preconditioner=torch.ones(2))
