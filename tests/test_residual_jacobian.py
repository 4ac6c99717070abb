"""ResidualJacobian and cgls on it against dense Jacobians of the residuals, in one process."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dhf
from dhf.operator import ResidualJacobian
from dhf.solvers import cgls
from tests.models import LOSSES, MODELS, dense, dense_jacobian, flat, module_outputs, problem, relative_error, split

KINDS = ["least squares", "mse"]


def setting(kind: str, model: str = "mlp", decay: float = 0.0) -> tuple[dhf.Objective, Any, Tensor, Tensor]:
    """An objective, its batch, and its scaled rows and residuals: the loss is ½‖r‖², rows are ∂r/∂θ."""
    objective, (x, y) = problem(model, "mse", weight_decay=decay)
    z, J = module_outputs(objective.module, x), dense_jacobian(objective.module, x)
    if kind == "mse":
        scale = math.sqrt(2 / z.numel())
        return objective, (x, y), scale * J, scale * (z - y).flatten()
    objective = dhf.LeastSquares(objective.module, weight_decay=decay)
    return objective, (x, y), J / math.sqrt(len(x)), z.flatten() / math.sqrt(len(x))


def stacked_solution(J: Tensor, r: Tensor, theta: Tensor, decay: float, damping: float) -> Tensor:
    """argmin ½‖r + J x‖² + ½ decay ‖θ + x‖² + ½ damping ‖x‖², by numpy's lstsq."""
    n = J.shape[1]
    rows = [J.numpy(), math.sqrt(decay) * np.eye(n), math.sqrt(damping) * np.eye(n)]
    right = [-r.numpy(), -math.sqrt(decay) * theta.numpy(), np.zeros(n)]
    return torch.from_numpy(np.linalg.lstsq(np.vstack(rows), np.concatenate(right), rcond=None)[0])


def vectors(n: int, number: int) -> Tensor:
    return torch.randn(number, n, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


# products


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_products_squares_and_residuals_are_those_of_dense_rows(kind: str, model: str, decay: float) -> None:
    objective, batch, J, r = setting(kind, model, decay)
    theta = flat(objective.module.parameters())
    with ResidualJacobian(objective, split(batch, [2, 4, 1])) as A:
        n = A.shape[0]
        assert pytest.approx(float(0.5 * r @ r + 0.5 * decay * theta @ theta), rel=1e-12) == A.loss
        assert relative_error(A.gradient, J.T @ r + decay * theta) < 1e-11
        assert relative_error(dense(A), J.T @ J + decay * torch.eye(n).double()) < 1e-9
        for v in vectors(n, 3):
            product, _ = A.apply(v)
            assert A.squared == pytest.approx(float((J @ v).square().sum() + decay * v @ v), rel=1e-11)
            assert float(v @ product) == pytest.approx(A.squared, rel=1e-9)
            rest, _ = A.residual(v)
            assert relative_error(rest, -J.T @ (r + J @ v) - decay * (theta + v)) < 1e-11


@pytest.mark.parametrize("kind", KINDS)
def test_residual_at_zero_is_minus_the_gradient(kind: str) -> None:
    objective, batch, *_ = setting(kind, decay=0.1)
    with ResidualJacobian(objective, [batch]) as A:
        rest, _ = A.residual(torch.zeros(43, dtype=torch.float64))
        torch.testing.assert_close(rest, -A.gradient, rtol=1e-12, atol=1e-14)


def test_residual_keeps_the_digits_of_small_singular_directions() -> None:
    """There rows round to σ ε, where -∇f - A x rounds to ε; cgls lives on that."""
    U, V = (torch.linalg.qr(torch.randn(m, 8, dtype=torch.float64))[0] for m in (20, 8))
    x = (U * torch.logspace(0, -6, 8, dtype=torch.float64)) @ V.T
    step = torch.randn(8, dtype=torch.float64)
    y = (x @ step + 0.01 * torch.randn(20, dtype=torch.float64))[:, None]
    module = nn.Linear(8, 1, bias=False).double()
    with torch.no_grad():
        module.weight.zero_()
    inputs, targets, moved, last = (t.numpy().astype(np.longdouble) for t in (x, y[:, 0], step, V[:, -1]))
    exact = np.longdouble(2) / 20 * inputs.T @ (targets - inputs @ moved)
    with ResidualJacobian(dhf.Objective(module, nn.MSELoss()), [(x, y)]) as A:
        by_rows = abs(last @ (A.residual(step)[0].numpy() - exact))
        by_product = abs(last @ ((-A.gradient - A @ step).numpy() - exact))
    assert by_product > 1e-19
    assert by_rows < 1e-2 * by_product


def test_frozen_and_unused_parameters() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.first, self.last = nn.Parameter(torch.ones(2)), nn.Linear(3, 4), nn.Linear(4, 2)
            self.first.bias.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x)))

    module = Partly().double()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    J = math.sqrt(2 / 10) * dense_jacobian(module, x)
    with ResidualJacobian(dhf.Objective(module, nn.MSELoss()), [(x, y)]) as A:
        assert relative_error(dense(A), J.T @ J) < 1e-10


def test_is_a_gauss_newton_operator_for_other_solvers() -> None:
    objective, batch, J, r = setting("mse", decay=0.2)
    theta = flat(objective.module.parameters())
    with ResidualJacobian(objective, [batch]) as A:
        solution = dhf.cg(A.shifted(0.1), -A.gradient, rtol=1e-12)
    assert relative_error(solution.x, stacked_solution(J, r, theta, 0.2, 0.1)) < 1e-8


# solves


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("damping", [1e-6, 0.1])
@pytest.mark.parametrize("sizes", [[7], [3, 4]])
def test_cgls_solves_the_damped_problem(kind: str, decay: float, damping: float, sizes: list[int]) -> None:
    objective, batch, J, r = setting(kind, decay=decay)
    theta = flat(objective.module.parameters())
    truth = stacked_solution(J, r, theta, decay, damping)
    A_dense = J.T @ J + (decay + damping) * torch.eye(43).double()
    b = -J.T @ r - decay * theta
    with ResidualJacobian(objective, split(batch, sizes)) as A:
        for x0 in (None, vectors(43, 1)[0]):
            solution = cgls(A, damping=damping, x0=x0, rtol=1e-11)
            assert solution.reason is dhf.Reason.RESIDUAL_TOLERANCE
            assert relative_error(solution.x, truth) < 1e-5
            model = float(0.5 * solution.x @ A_dense @ solution.x - b @ solution.x)
            assert solution.model == pytest.approx(model, rel=1e-9)
            assert solution.true_residual_norm <= 2e-11 * float(b.norm())
            assert solution.iterations == len(solution.history) - 1


def test_preconditioned_cgls_takes_fewer_iterations() -> None:
    objective, batch, J, r = setting("least squares")
    inverse = torch.linalg.inv(J.T @ J + 0.01 * torch.eye(43).double())
    with ResidualJacobian(objective, [batch]) as A:
        solution = cgls(A, damping=0.01, rtol=1e-9, preconditioner=lambda r: inverse @ r)
    assert solution.iterations <= 2
    assert relative_error(solution.x, stacked_solution(J, r, torch.zeros(43), 0.0, 0.01)) < 1e-7


class Counted(ResidualJacobian):
    """Counts what a solver asks for."""

    applied = residuals = 0

    def apply(self, *arguments: Any) -> Any:
        self.applied += 1
        return super().apply(*arguments)

    def residual(self, *arguments: Any) -> Any:
        self.residuals += 1
        return super().residual(*arguments)


@pytest.mark.parametrize("rtol", [1e-1, 1e-5, 1e-12])
def test_one_product_per_iteration_and_few_residuals(rtol: float) -> None:
    objective, batch, *_ = setting("mse")
    with Counted(objective, [batch]) as A:
        before = A.comm.collectives
        solution = cgls(A, damping=1e-6, rtol=rtol)
        assert A.comm.collectives - before == A.applied + A.residuals
    assert A.applied == solution.iterations
    fall = min(i.residual_norm for i in solution.history) / solution.history[0].residual_norm
    assert 1 <= A.residuals <= 1 + math.log(1 / fall, 100)
    if rtol == 1e-12:
        assert A.residuals > 3


# refusals


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "mse"])
def test_other_losses_are_refused(loss: str) -> None:
    objective, batch = problem("mlp", loss)
    with pytest.raises(dhf.UsageError, match=r"cgls needs a sum of squares.*solve with cg"):
        ResidualJacobian(objective, [batch])


def test_an_overridden_loss_is_refused() -> None:
    class Other(dhf.Objective):
        def loss(self, outputs: Tensor, batch: Any) -> Tensor:
            return outputs.abs().mean()

    objective, batch = problem()
    with pytest.raises(dhf.UsageError, match="Other has another loss"):
        ResidualJacobian(Other(objective.module, nn.MSELoss()), [batch])


def test_what_is_no_objective_is_refused() -> None:
    with pytest.raises(dhf.UsageError, match=r"expected a dhf\.Objective, got Linear"):
        ResidualJacobian(nn.Linear(2, 2), [])


def test_cgls_on_other_operators_is_refused() -> None:
    objective, batch = problem()
    with dhf.GaussNewton(objective, [batch]) as A, pytest.raises(dhf.UsageError, match="GaussNewton has none"):
        cgls(A)


def test_cgls_takes_no_right_hand_side_beside_the_residuals() -> None:
    objective, batch = problem()
    with ResidualJacobian(objective, [batch]) as A, pytest.raises(ValueError, match="its own right-hand side"):
        cgls(A, torch.ones(43, dtype=torch.float64))


def test_products_after_parameters_moved_are_refused() -> None:
    objective, batch = problem()
    with ResidualJacobian(objective, [batch]) as A:
        v = torch.ones(43, dtype=torch.float64)
        with torch.no_grad():
            A.parameters.tensors[0].add_(1.0)
        for ask in (A.apply, A.residual):
            with pytest.raises(dhf.StaleGraphError):
                ask(v)
    with pytest.raises(dhf.StaleGraphError, match="closed"):
        A.residual(v)


def test_vectors_of_another_form_are_refused() -> None:
    objective, batch = problem()
    with ResidualJacobian(objective, [batch]) as A:
        for ask in (A.apply, A.residual):
            with pytest.raises(ValueError, match=r"expected a vector of shape \(43,\), got \(42,\)"):
                ask(torch.ones(42, dtype=torch.float64))
            with pytest.raises(ValueError, match=r"torch\.float64"):
                ask(torch.ones(43))
