"""steihaug: the path of conjugate gradients up to the boundary, and what theory promises of its end."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dhf import Reason, Solution, cg, steihaug
from tests.solvers.systems import indefinite, model, orthogonal, spd, vector, with_eigenvalues


def exact(A: Tensor, b: Tensor, radius: float) -> Tensor:
    """The minimiser of the model within the region, from the eigenvalues and the secular equation."""
    values, vectors = torch.linalg.eigh(A)
    coefficients = vectors.T @ b
    low = max(0.0, -float(values[0])) + 1e-14

    def x(shift: float) -> Tensor:
        return vectors @ (coefficients / (values + shift))

    if float(values[0]) > 0 and float(x(0.0).norm()) <= radius:
        return x(0.0)
    high = low + float(b.norm()) / radius + float(values.abs().max())
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if float(x(middle).norm()) > radius else (low, middle)
    return x(high)


def cauchy(A: Tensor, b: Tensor, radius: float) -> Tensor:
    """The lowest point within the region along b."""
    curvature, longest = float(b @ A @ b), radius / float(b.norm())
    return b * (longest if curvature <= 0 else min(float(b @ b) / curvature, longest))


def check(solution: Solution, A: Tensor, b: Tensor, radius: float) -> None:
    """What holds of every end."""
    x = solution.x
    assert float(x.norm()) <= radius * (1 + 1e-10)
    assert solution.model == pytest.approx(model(A, b, x), rel=1e-9, abs=1e-12)
    assert solution.true_residual_norm == pytest.approx(float((b - A @ x).norm()), rel=1e-6, abs=1e-9)
    assert solution.residual_norm == pytest.approx(solution.true_residual_norm, rel=1e-3, abs=1e-7)
    assert model(A, b, x) <= model(A, b, cauchy(A, b, radius)) + 1e-10
    assert model(A, b, x) >= model(A, b, exact(A, b, radius)) - 1e-8
    models = [line.model for line in solution.history]
    assert all(later <= earlier + 1e-15 * abs(earlier) for earlier, later in itertools.pairwise(models))
    if solution.reason is Reason.TRUST_REGION_BOUNDARY:
        assert float(x.norm()) == pytest.approx(radius, rel=1e-10)


# definite models


def test_far_from_the_boundary_it_is_cg() -> None:
    A, b = spd(30, 1e3), vector(30)
    solution, truth = steihaug(A, b, radius=1e3, rtol=1e-8), cg(A, b, rtol=1e-8)
    assert solution.reason is Reason.RESIDUAL_TOLERANCE
    assert torch.equal(solution.x, truth.x)
    assert solution.history[1:] == truth.history[1:]
    torch.testing.assert_close(solution.x, torch.linalg.solve(A, b))
    check(solution, A, b, 1e3)


@pytest.mark.parametrize("fraction", [1e-6, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_ends_where_the_path_of_scipys_iterates_meets_the_boundary(fraction: float) -> None:
    A, b = spd(40, 50.0), vector(40)
    path = [np.zeros(40)]
    scipy.sparse.linalg.cg(A.numpy(), b.numpy(), rtol=1e-12, callback=lambda x: path.append(x.copy()))
    radius = fraction * float(np.linalg.norm(path[-1]))
    k = next(k for k, x in enumerate(path) if np.linalg.norm(x) >= radius)
    before, step = torch.from_numpy(path[k - 1]), torch.from_numpy(path[k] - path[k - 1])
    ss, xs, xx = float(step @ step), float(before @ step), float(before @ before)
    tau = (math.sqrt(xs * xs + ss * (radius**2 - xx)) - xs) / ss
    solution = steihaug(A, b, radius=radius, rtol=1e-12)
    assert (solution.reason, solution.iterations) == (Reason.TRUST_REGION_BOUNDARY, k)
    assert solution.direction is None
    torch.testing.assert_close(solution.x, before + tau * step, rtol=1e-6, atol=1e-9)
    check(solution, A, b, radius)


@given(seed=st.integers(0, 1000), n=st.integers(1, 25), condition=st.floats(1, 1e4), radius=st.floats(-3, 2))
def test_gains_at_least_half_of_what_can_be_gained(seed: int, n: int, condition: float, radius: float) -> None:
    A, b, radius = spd(n, condition, seed), vector(n, seed + 1), 10**radius
    solution = steihaug(A, b, radius=radius, rtol=1e-10, max_iterations=100 * n)
    assert solution.reason in (Reason.RESIDUAL_TOLERANCE, Reason.TRUST_REGION_BOUNDARY)
    check(solution, A, b, radius)
    assert solution.model <= 0.5 * model(A, b, exact(A, b, radius))  # Yuan (2000)


def test_model_falls_as_the_region_grows() -> None:
    for A in (spd(30, 1e3), indefinite(30, 1e3)):
        models = [steihaug(A, vector(30), radius=r).model for r in np.logspace(-3, 3, 60)]
        assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(models))


def test_lengths_grow_along_the_path() -> None:
    A, b = spd(40, 1e4), vector(40)
    solution = steihaug(A, b, radius=0.9 * float(torch.linalg.solve(A, b).norm()), snapshot_ratio=1.0001)
    assert solution.reason is Reason.TRUST_REGION_BOUNDARY
    assert solution.iterations > 20
    lengths = [float(i.x.norm()) for i in solution.iterates]
    assert all(earlier < later for earlier, later in itertools.pairwise(lengths))
    assert [i.number for i in solution.iterates] == list(range(1, solution.iterations + 1))
    assert torch.equal(solution.iterates[-1].x, solution.x)
    for kept, line in zip(solution.iterates, solution.history[1:], strict=True):
        assert kept.model == line.model


# indefinite models


@pytest.mark.parametrize("radius", [1e-3, 1.0, 1e3])
def test_negative_curvature_along_the_right_hand_side(radius: float) -> None:
    A, b = -spd(6), vector(6)
    solution = steihaug(A, b, radius=radius)
    assert solution.reason is Reason.TRUST_REGION_BOUNDARY
    assert solution.converged
    torch.testing.assert_close(solution.x, radius * b / b.norm())
    assert torch.equal(solution.direction, b)
    assert solution.iterations == 1
    assert solution.history[-1].curvature == pytest.approx(float(b @ A @ b / (b @ b)))
    check(solution, A, b, radius)


@given(seed=st.integers(0, 1000), radius=st.floats(-3, 3))
def test_indefinite_models_end_on_the_boundary(seed: int, radius: float) -> None:
    n, radius = 15, 10**radius
    values = torch.logspace(0, 2, n, dtype=torch.float64)
    values[0] = -0.5
    A, b = with_eigenvalues(values, seed), vector(n, seed + 1)
    solution = steihaug(A, b, radius=radius, rtol=1e-13)
    assert solution.reason is Reason.TRUST_REGION_BOUNDARY
    check(solution, A, b, radius)
    if solution.direction is not None:
        d = solution.direction
        assert float(d @ A @ d) <= 1e-12 * float(d @ d)
        assert solution.history[-1].curvature == pytest.approx(float(d @ A @ d / (d @ d)), rel=1e-6, abs=1e-12)
        before = cg(A, b, rtol=1e-13).x
        assert abs(float((solution.x - before) @ d)) == pytest.approx(float((solution.x - before).norm() * d.norm()))
    assert all(line.curvature > 0 for line in solution.history[1:-1])


def test_direction_of_no_curvature() -> None:
    A = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    solution = steihaug(A, torch.tensor([0.0, 2.0], dtype=torch.float64), radius=3.0)
    assert torch.equal(solution.x, torch.tensor([0.0, 3.0], dtype=torch.float64))
    assert (solution.model, solution.reason) == (-6.0, Reason.TRUST_REGION_BOUNDARY)
    assert solution.direction is not None


@pytest.mark.parametrize("scale", [1e-20, 1e20])
@pytest.mark.parametrize("sign", [1, -1])
def test_float32_at_any_scale(scale: float, sign: int) -> None:
    A, b = (sign * scale * spd(10, 10.0)).float(), vector(10).float()
    solution = steihaug(A, b, radius=0.1 / scale, rtol=1e-4)
    assert solution.reason is Reason.TRUST_REGION_BOUNDARY
    assert float(solution.x.double().norm()) == pytest.approx(0.1 / scale, rel=1e-6)
    assert (solution.direction is None) == (sign == 1)


# preconditioners


@pytest.mark.parametrize("matrix", ["definite", "indefinite"])
@pytest.mark.parametrize("radius", [1e-2, 1.0, 10.0, 1e4])
def test_a_preconditioner_is_a_change_of_variables(radius: float, matrix: str) -> None:
    A, b, M = (spd if matrix == "definite" else indefinite)(30, 1e3), vector(30), spd(30, 50.0, seed=4)
    solution = steihaug(A, b, radius=radius, rtol=1e-10, preconditioner=lambda r: torch.linalg.solve(M, r))
    L = torch.linalg.cholesky(M)  # y = Lᵀx, ‖y‖ = ‖x‖_M
    inner = torch.linalg.solve_triangular(L, A, upper=False)
    inner = torch.linalg.solve_triangular(L, inner.T, upper=False)
    truth = steihaug(
        0.5 * (inner + inner.T),
        torch.linalg.solve_triangular(L, b[:, None], upper=False)[:, 0],
        radius=radius,
        rtol=1e-10,
    )
    assert solution.reason is truth.reason
    torch.testing.assert_close(L.T @ solution.x, truth.x, rtol=1e-6, atol=1e-6 * radius)
    assert solution.model == pytest.approx(truth.model, rel=1e-9)
    if solution.reason is Reason.TRUST_REGION_BOUNDARY:
        assert math.sqrt(float(solution.x @ M @ solution.x)) == pytest.approx(radius, rel=1e-10)


def test_norms_hold_over_many_iterations() -> None:
    A, M = spd(200, 1e6), torch.logspace(0, 3, 200, dtype=torch.float64)
    b, q = vector(200), orthogonal(200, 5)
    for radius in (1.0, 10.0, 30.0):
        solution = steihaug(
            A, b, radius=radius, rtol=1e-9, max_iterations=5000, preconditioner=lambda r: q @ ((q.T @ r) / M)
        )
        length = math.sqrt(float((q.T @ solution.x) ** 2 @ M))
        assert length <= radius * (1 + 1e-10)
        if solution.reason is Reason.TRUST_REGION_BOUNDARY:
            assert length == pytest.approx(radius, rel=1e-10)
            assert solution.iterations > (1 if radius == 1 else 100)


# arguments


@pytest.mark.parametrize("radius", [0.0, -1.0, math.nan, math.inf])
def test_radius_out_of_range(radius: float) -> None:
    with pytest.raises(ValueError, match="radius must be positive and finite, got"):
        steihaug(spd(3), vector(3), radius=radius)
