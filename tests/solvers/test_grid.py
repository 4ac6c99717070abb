"""Every kind of operator x every solver for symmetric operators, against dense float64 algebra."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dhf import Reason, Solution, cg, minres, steihaug
from tests.solvers.systems import Counting, NanAt, indefinite, orthogonal, spd, vector, with_eigenvalues

LARGE = 1e15  # a trust region in which no solution meets the boundary


def unbounded(*args: Any, **options: Any) -> Solution:
    """steihaug, far from its boundary."""
    return steihaug(*args, radius=LARGE, **options)


SOLVERS: dict[str, Callable[..., Solution]] = {"cg": cg, "minres": minres, "steihaug": unbounded}
each_solver = pytest.mark.parametrize("solve", list(SOLVERS.values()), ids=list(SOLVERS))
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
MANY = 20_000  # iterations


def backward_error(A: Tensor, b: Tensor, x: Tensor) -> float:
    """``‖b - A x‖ / (‖A‖‖x‖ + ‖b‖)``: how far from A and b is the system that x solves exactly."""
    x = x.double()
    return float((b - A @ x).norm() / (torch.linalg.matrix_norm(A, 2) * x.norm() + b.norm()))


def tells_the_truth(solution: Solution, A: Tensor, b: Tensor) -> bool:
    """Whether the reported true residual norm is that of x, up to the rounding of one product."""
    x = solution.x.double()
    exact = float((b - A.double() @ x).norm())
    rounding = (
        10 * torch.finfo(solution.x.dtype).eps * float(torch.linalg.matrix_norm(A.double(), 2) * x.norm() + b.norm())
    )
    return abs(solution.true_residual_norm - exact) <= rounding


# definite systems


@each_dtype
@each_solver
@pytest.mark.parametrize("condition", [1, 1e2, 1e4, 1e6, 1e8, 1e10])
def test_attainable_accuracy(solve: Callable[..., Solution], condition: float, dtype: torch.dtype) -> None:
    A, b, eps = spd(12, condition).to(dtype), vector(12).to(dtype), torch.finfo(dtype).eps
    solution = solve(A, b, rtol=10 * eps, max_iterations=MANY)
    error = backward_error(A.double(), b.double(), solution.x)
    assert tells_the_truth(solution, A, b.double())
    lost = eps * condition  # all digits of a float32 where it exceeds 1
    if lost < 0.1:
        assert solution.reason in (Reason.RESIDUAL_TOLERANCE, Reason.ACCURACY_LOST)
        # conjugate gradients are backward stable; minimal residuals lose a condition number more
        assert error <= 10 * eps * (max(1.0, 0.1 * condition) if solve is minres else 1.0)
        truth = torch.linalg.solve(A.double(), b.double())
        residual = solution.true_residual_norm / float(torch.linalg.matrix_norm(A.double(), 2))
        assert float((solution.x - truth).norm()) <= 1.1 * condition * (residual + eps * float(truth.norm()))
    else:
        assert solution.reason is not Reason.NOT_SYMMETRIC
        assert solution.reason is not Reason.INDEFINITE_PRECONDITIONER
        assert math.isfinite(solution.true_residual_norm)


@each_solver
@pytest.mark.parametrize("condition", [1, 1e2, 1e4, 1e6])
def test_tolerance_that_can_be_reached(solve: Callable[..., Solution], condition: float) -> None:
    A, b = spd(12, condition), vector(12)
    solution = solve(A, b, rtol=1e-6, max_iterations=MANY)
    assert solution.reason is Reason.RESIDUAL_TOLERANCE
    assert float((b - A @ solution.x).norm()) <= 1.01e-6 * float(b.norm())
    assert solution.model == pytest.approx(float(0.5 * solution.x @ A @ solution.x - b @ solution.x), rel=1e-8)


@each_solver
@pytest.mark.parametrize("a", [2.0, 1e-12, 1e12])
def test_one_unknown(solve: Callable[..., Solution], a: float) -> None:
    solution = solve(torch.full((1, 1), a, dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64))
    assert solution.reason is Reason.RESIDUAL_TOLERANCE
    assert solution.iterations == 1
    assert float(solution.x[0]) == pytest.approx(3 / a)


@each_solver
def test_identity(solve: Callable[..., Solution]) -> None:
    b = vector(9)
    solution = solve(torch.eye(9, dtype=torch.float64), b, rtol=1e-14)
    assert (solution.iterations, solution.reason) == (1, Reason.RESIDUAL_TOLERANCE)
    torch.testing.assert_close(solution.x, b)


@each_solver
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_scale_of_matrix_and_right_hand_side(solve: Callable[..., Solution], scale: float) -> None:
    A, b = spd(10, 10.0), vector(10)
    for dtype in (torch.float32, torch.float64):
        truth = solve(A.to(dtype), b.to(dtype))
        for scaled in (solve((scale * A).to(dtype), b.to(dtype)), solve(A.to(dtype), (scale * b).to(dtype))):
            assert scaled.reason is Reason.RESIDUAL_TOLERANCE
            assert abs(scaled.iterations - truth.iterations) <= 1


# indefinite and singular systems


@each_dtype
@each_solver
@pytest.mark.parametrize("condition", [1, 1e1, 1e2])
def test_indefinite(solve: Callable[..., Solution], condition: float, dtype: torch.dtype) -> None:
    A, b = indefinite(15, condition).to(dtype), vector(15).to(dtype)
    solution = solve(A, b, rtol=1e-4, max_iterations=MANY)
    assert tells_the_truth(solution, A, b.double())
    if solve is minres:
        assert solution.reason is Reason.RESIDUAL_TOLERANCE
        truth = torch.linalg.solve(A.double(), b.double())
        assert float((solution.x - truth).norm()) <= 2e-4 * condition * float(b.norm())
    else:
        assert solution.reason is (Reason.NEGATIVE_CURVATURE if solve is cg else Reason.TRUST_REGION_BOUNDARY)
        assert solution.direction is not None
        assert float(solution.direction @ A @ solution.direction) <= 0


def singular(n: int, rank: int, indefinite: bool = False) -> Tensor:
    """Eigenvalues from 1 to 10, some of them negative, and zeros."""
    values = torch.zeros(n, dtype=torch.float64)
    values[:rank] = torch.linspace(1, 10, rank, dtype=torch.float64)
    if indefinite:
        values[: rank // 2] *= -1
    return with_eigenvalues(values)


@each_dtype
@each_solver
@pytest.mark.parametrize("rank", [1, 4, 11])
def test_singular_and_consistent(solve: Callable[..., Solution], rank: int, dtype: torch.dtype) -> None:
    A = singular(12, rank)
    b = A @ vector(12)
    solution = solve(A.to(dtype), b.to(dtype), rtol=1e-5)
    assert solution.reason is Reason.RESIDUAL_TOLERANCE
    shortest = torch.linalg.lstsq(A, b, driver="gelsd", rcond=1e-10).solution
    torch.testing.assert_close(solution.x.double(), shortest, rtol=1e-3, atol=1e-4)


@each_dtype
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("signs", ["semidefinite", "indefinite"])
@pytest.mark.parametrize("rank", [1, 2, 5, 39])
def test_minres_on_singular_and_inconsistent(rank: int, signs: str, preconditioned: bool, dtype: torch.dtype) -> None:
    A, b, M = singular(40, rank, signs == "indefinite"), vector(40), spd(40, 10.0, seed=8)
    narrow = M.to(dtype)
    solution = minres(A.to(dtype), b.to(dtype), preconditioner=(lambda r: narrow @ r) if preconditioned else None)
    assert solution.reason is Reason.LEAST_SQUARES_SOLUTION
    assert solution.converged
    assert tells_the_truth(solution, A, b)
    # in the preconditioner's norm
    L = torch.linalg.cholesky(M).T if preconditioned else torch.eye(40, dtype=torch.float64)
    best = torch.linalg.lstsq(L @ A, L @ b, driver="gelsd", rcond=1e-10).solution
    least = float((L @ (b - A @ best)).norm())
    assert float((L @ (b - A @ solution.x.double())).norm()) <= least * (1 + 100 * torch.finfo(dtype).eps)
    assert float(solution.x.norm()) <= 10 * float(b.norm())


@each_solver
def test_singular_and_inconsistent_never_claims_to_have_converged(solve: Callable[..., Solution]) -> None:
    solution = solve(singular(12, 8), vector(12))
    assert solution.reason is not Reason.RESIDUAL_TOLERANCE


@each_solver
@pytest.mark.parametrize("n", [1, 5])
def test_zero_matrix(solve: Callable[..., Solution], n: int) -> None:
    b = vector(n)
    solution = solve(torch.zeros(n, n, dtype=torch.float64), b)
    if solve is unbounded:
        assert solution.reason is Reason.TRUST_REGION_BOUNDARY
        torch.testing.assert_close(solution.x, b * LARGE / b.norm())
    else:
        assert solution.reason is (Reason.LEAST_SQUARES_SOLUTION if solve is minres else Reason.NEGATIVE_CURVATURE)
        assert not solution.x.any()
        assert (solution.iterations, solution.true_residual_norm) == (0, pytest.approx(float(b.norm())))


# right-hand sides and starts


@each_solver
def test_zero_right_hand_side(solve: Callable[..., Solution]) -> None:
    A = Counting(spd(4))
    solution = solve(A, torch.zeros(4, dtype=torch.float64))
    assert solution.reason is Reason.ZERO_RIGHT_HAND_SIDE
    assert not solution.x.any()
    assert (solution.iterations, solution.model, solution.true_residual_norm, A.products) == (0, 0.0, 0.0, 0)


@pytest.mark.parametrize("solve", [cg, minres])
@pytest.mark.parametrize("rtol", [1e-10, 0.0])
def test_exact_start_takes_no_iteration(solve: Callable[..., Solution], rtol: float) -> None:
    A = torch.diag(torch.arange(1, 6).double())
    x0 = torch.tensor([1.0, -2.0, 4.0, 0.5, 0.0], dtype=torch.float64)  # A x0 is exact
    solution = solve(A, A @ x0, x0=x0, rtol=rtol)
    assert (solution.reason, solution.iterations) == (Reason.RESIDUAL_TOLERANCE, 0)
    assert torch.equal(solution.x, x0)
    assert solution.model == pytest.approx(-0.5 * float(x0 @ A @ x0))


@each_solver
def test_one_product_per_iteration_and_one_for_the_true_residual(solve: Callable[..., Solution]) -> None:
    A = Counting(spd(20))
    solution = solve(A, vector(20))
    assert solution.reason is Reason.RESIDUAL_TOLERANCE
    assert A.products == solution.iterations + 1


# operators that are not what they should be


@each_solver
@pytest.mark.parametrize("size", [1.0, 0.3, 0.1])
@pytest.mark.parametrize("condition", [1e1, 1e4, 1e8])
@pytest.mark.parametrize("n", [3, 30, 300])
def test_nonsymmetric_operator(solve: Callable[..., Solution], n: int, condition: float, size: float) -> None:
    K = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) / math.sqrt(n)
    A = spd(n, condition) / condition + size * (K - K.T)
    for dtype in (torch.float32, torch.float64):
        solution = solve(A.to(dtype), vector(n).to(dtype), rtol=0.0)
        assert solution.reason is Reason.NOT_SYMMETRIC
        assert solution.iterations <= 5
        assert not solution.converged
        assert tells_the_truth(solution, A.to(dtype), vector(n))


@each_solver
def test_nonsymmetric_operator_with_a_preconditioner(solve: Callable[..., Solution]) -> None:
    A, M = spd(20) + 30 * torch.triu(torch.ones(20, 20, dtype=torch.float64), 1), spd(20, 10.0, seed=3)
    assert solve(A, vector(20), rtol=1e-10, preconditioner=lambda r: M @ r).reason is Reason.NOT_SYMMETRIC


@each_solver
def test_another_matrix_at_every_product(solve: Callable[..., Solution]) -> None:
    class Rotating(Counting):
        def matvec(self, v: Tensor) -> Tensor:
            self.products += 1
            return v * (1.0 + ((torch.arange(5) + self.products) % 5).double() ** 3)

    assert solve(Rotating(torch.eye(5)), vector(5), rtol=1e-15).reason is Reason.NOT_SYMMETRIC


@each_dtype
@each_solver
@pytest.mark.parametrize("kind", ["even", "two", "one large", "one small"])
def test_symmetric_operators_are_never_called_nonsymmetric(
    solve: Callable[..., Solution], kind: str, dtype: torch.dtype
) -> None:
    rng = random.Random(kind)
    for seed in range(25):
        n, condition = rng.choice([2, 3, 5, 40]), 10 ** rng.uniform(0, 10)
        small = torch.full((n,), 1 / condition, dtype=torch.float64)
        values = {
            "even": torch.logspace(0, -math.log10(condition), n, dtype=torch.float64),
            "two": torch.where(torch.arange(n) % 2 == 0, 1.0, small),
            "one large": torch.where(torch.arange(n) == 0, 1.0, small),
            "one small": torch.where(torch.arange(n) == 0, small, 1.0),
        }[kind]
        q = orthogonal(n, seed)
        A, inverse = with_eigenvalues(values, seed), (q / values) @ q.T
        narrow, diagonal = inverse.to(dtype), A.to(dtype).diagonal()
        preconditioners: list[Any] = [None, lambda r, d=diagonal: r / d, lambda r, M=narrow: M @ r]
        for b in (vector(n, seed), q[:, -1].clone(), q[:, 0].clone(), A @ vector(n, seed)):
            for M in preconditioners:
                solution = solve(A.to(dtype), b.to(dtype), rtol=0.0, max_iterations=8, preconditioner=M)
                assert solution.reason is not Reason.NOT_SYMMETRIC


@each_solver
@pytest.mark.parametrize("product", [1, 2, 5])
@pytest.mark.parametrize("preconditioned", [False, True])
def test_nan_in_a_product_leaves_the_last_good_iterate(
    solve: Callable[..., Solution], product: int, preconditioned: bool
) -> None:
    A, b = spd(10, 1e3), vector(10)
    M = (lambda r: r / A.diagonal()) if preconditioned else None
    solution = solve(NanAt(A, product), b, rtol=1e-10, preconditioner=M)
    assert solution.reason is Reason.NON_FINITE
    assert solution.iterations == product - 1
    torch.testing.assert_close(solution.x, solve(A, b, max_iterations=product - 1, preconditioner=M).x)
    assert torch.isfinite(solution.x).all()


@each_solver
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_right_hand_side(solve: Callable[..., Solution], bad: float) -> None:
    b = vector(4)
    b[1] = bad
    solution = solve(spd(4), b)
    assert (solution.reason, solution.iterations) == (Reason.NON_FINITE, 0)
    assert not solution.x.any()


# preconditioners


@each_solver
@pytest.mark.parametrize("condition", [1e2, 1e6])
@pytest.mark.parametrize("quality", [0.0, 0.1])
def test_preconditioner_by_an_approximate_inverse(
    solve: Callable[..., Solution], quality: float, condition: float
) -> None:
    A, b = spd(40, condition), vector(40)
    inverse = torch.linalg.inv(A)
    root = torch.linalg.cholesky(inverse)
    noise = torch.randn(40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) / 40**0.5
    M = root @ (torch.eye(40, dtype=torch.float64) + quality * (noise + noise.T)) @ root.T
    solution = solve(A, b, rtol=1e-8, preconditioner=lambda r: M @ r)
    assert solution.reason is Reason.RESIDUAL_TOLERANCE
    assert solution.iterations <= (2 if quality == 0 else 20)
    assert float((b - A @ solution.x).norm()) <= 1.01e-8 * float(b.norm())
    torch.testing.assert_close(solution.x, torch.linalg.solve(A, b), rtol=1e-7 * condition, atol=1e-8)


def test_minres_preconditioned_by_the_inverse_of_the_absolute_value_takes_two_iterations() -> None:
    A, b = indefinite(30, 1e4), vector(30)
    values, vectors = torch.linalg.eigh(A)
    M = (vectors / values.abs()) @ vectors.T
    solution = minres(A, b, rtol=1e-9, preconditioner=lambda r: M @ r)
    assert (solution.iterations, solution.reason) == (2, Reason.RESIDUAL_TOLERANCE)
    torch.testing.assert_close(solution.x, torch.linalg.solve(A, b), rtol=1e-6, atol=1e-9)


@each_solver
def test_indefinite_preconditioner(solve: Callable[..., Solution]) -> None:
    A, b = spd(6), torch.ones(6, dtype=torch.float64)
    first = solve(A, b, preconditioner=lambda r: -r)
    assert (first.reason, first.iterations) == (Reason.INDEFINITE_PRECONDITIONER, 0)
    assert not first.x.any()
    assert first.true_residual_norm == pytest.approx(float(b.norm()))
    singular = solve(A, b, preconditioner=lambda r: 0 * r)
    assert (singular.reason, singular.iterations) == (Reason.INDEFINITE_PRECONDITIONER, 0)
    signs = torch.tensor([3.0, 1, 1, 1, 1, -1], dtype=torch.float64)
    later = solve(A, b, rtol=1e-12, preconditioner=lambda r: signs * r)
    allowed = [Reason.INDEFINITE_PRECONDITIONER]
    allowed += [] if solve is minres else [Reason.NEGATIVE_CURVATURE, Reason.TRUST_REGION_BOUNDARY]
    assert later.reason in allowed
    assert tells_the_truth(later, A, b)


@each_solver
@pytest.mark.parametrize("call", [1, 3])
def test_nan_from_the_preconditioner(solve: Callable[..., Solution], call: int) -> None:
    calls = 0

    def M(r: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return r * (math.nan if calls == call else 1.0)

    solution = solve(spd(10, 1e3), vector(10), preconditioner=M)
    assert solution.reason is Reason.NON_FINITE
    assert torch.isfinite(solution.x).all()


@each_solver
def test_what_the_preconditioner_raises_is_raised(solve: Callable[..., Solution]) -> None:
    with pytest.raises(ZeroDivisionError):
        solve(spd(4), vector(4), preconditioner=lambda r: r * (1 // 0))


# what all solvers share


@each_solver
@pytest.mark.parametrize("preconditioned", [False, True])
def test_history_is_that_of_the_iterates(solve: Callable[..., Solution], preconditioned: bool) -> None:
    A, b, seen = spd(25, 1e3), vector(25), []
    solution = solve(
        A,
        b,
        rtol=1e-8,
        snapshot_ratio=1.0001,
        callback=seen.append,
        preconditioner=(lambda r: r / A.diagonal()) if preconditioned else None,
    )
    assert [i.number for i in solution.history] == list(range(solution.iterations + 1))
    assert [i.number for i in solution.iterates] == list(range(1, solution.iterations + 1))
    assert seen[1:] == solution.history[1:]
    assert math.isnan(seen[0].curvature)
    assert (seen[0].model, seen[0].residual_norm) == (0.0, pytest.approx(float(b.norm())))
    eigenvalues = torch.linalg.eigvalsh(A)
    for kept, line in zip(solution.iterates, solution.history[1:], strict=True):
        assert line.model == kept.model == pytest.approx(float(0.5 * kept.x @ A @ kept.x - b @ kept.x), rel=1e-8)
        assert line.residual_norm == pytest.approx(float((b - A @ kept.x).norm()), rel=1e-5, abs=1e-9)
        assert 0.999 * float(eigenvalues[0]) <= line.curvature <= 1.001 * float(eigenvalues[-1])
    assert torch.equal(solution.iterates[-1].x, solution.x)


@each_solver
def test_iteration_limit(solve: Callable[..., Solution]) -> None:
    A, b = spd(30, 1e4), vector(30)
    solution = solve(A, b, rtol=1e-10, max_iterations=5)
    assert (solution.reason, solution.iterations) == (Reason.ITERATION_LIMIT, 5)
    assert solution.true_residual_norm == pytest.approx(solution.residual_norm, rel=1e-9)
    none = solve(A, b, max_iterations=0)
    assert (none.reason, none.iterations) == (Reason.ITERATION_LIMIT, 0)


@each_solver
def test_absolute_tolerance(solve: Callable[..., Solution]) -> None:
    solution = solve(spd(30, 1e3), vector(30), rtol=0.0, atol=1e-3)
    assert solution.reason is Reason.RESIDUAL_TOLERANCE
    assert solution.residual_norm <= 1e-3 < solution.history[-2].residual_norm


@each_solver
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rtol": 1.0}, "rtol must be in"),
        ({"atol": -1.0}, "atol not negative"),
        ({"max_iterations": -1}, "max_iterations must not be negative"),
        ({"snapshot_ratio": 1.0}, "snapshot_ratio must be above 1"),
    ],
)
def test_arguments_out_of_range(solve: Callable[..., Solution], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        solve(spd(4), vector(4), **options)


@each_solver
def test_systems_that_do_not_fit(solve: Callable[..., Solution]) -> None:
    with pytest.raises(ValueError, match=r"operator has shape \(4, 4\), the right-hand side \(3,\)"):
        solve(torch.eye(4), torch.ones(3))
    with pytest.raises(TypeError, match="neither matvec"):
        solve(object(), vector(3))
    with pytest.raises(TypeError, match="preconditioner must be a function of r, got Tensor"):
        solve(torch.eye(2), torch.ones(2), preconditioner=torch.ones(2))


@each_solver
def test_a_tolerance_below_the_dtype_is_warned_of(solve: Callable[..., Solution]) -> None:
    with pytest.warns(
        UserWarning, match=r"rtol=1e-12 is below what float32 can reach .about 1e-07 times .* use float64"
    ):
        solve(torch.eye(2), torch.ones(2), rtol=1e-12)
    with pytest.warns(UserWarning, match=r"below what float64 can reach .* use a larger rtol"):
        solve(torch.eye(2).double(), torch.ones(2).double(), rtol=1e-17)


@pytest.mark.filterwarnings("error")
@each_solver
@pytest.mark.parametrize("rtol", [0.0, 2e-7])
def test_other_tolerances_are_not(solve: Callable[..., Solution], rtol: float) -> None:
    solve(torch.eye(2), torch.ones(2), rtol=rtol)
