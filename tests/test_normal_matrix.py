"""NormalMatrix and direct on it, in parameter and in sample space, against dense matrices and numpy's lstsq."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dhf
from dhf.curvature import GradientGraph
from dhf.errors import PerSampleError
from dhf.operator import NormalMatrix
from dhf.solvers import Direct
from tests.models import (
    CLASSES,
    LOSSES,
    dense_gauss_newton,
    dense_jacobian,
    flat,
    module_outputs,
    problem,
    relative_error,
    split,
)

# the plain loss of each objective's loss
PLAIN: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    **{name: LOSSES[name][:2] for name in ("mse", "cross_entropy", "bce")},
    "bce sum": (dhf.BinaryCrossEntropy("sum"), lambda z, y: LOSSES["bce"][1](z, y) * CLASSES),
    "least squares": (None, lambda z, y: 0.5 * z.square().sum() / len(z)),
    "smooth labels": (
        nn.CrossEntropyLoss(label_smoothing=0.2),
        lambda z, y: F.cross_entropy(z, y, label_smoothing=0.2),
    ),
}
SQUARES = ["mse", "least squares"]


def setting(kind: str, decay: float = 0.0, model: str = "mlp") -> tuple[dhf.Objective, Any]:
    data = {"bce sum": "bce", "smooth labels": "cross_entropy", "least squares": "mse"}.get(kind, kind)
    objective, batch = problem(model, data)
    if kind == "least squares":
        return dhf.LeastSquares(objective.module, weight_decay=decay), batch
    return dhf.Objective(objective.module, PLAIN[kind][0], weight_decay=decay), batch


def operator_of(objective: dhf.Objective, batches: list[Any]) -> dhf.GlobalOperator:
    """As the optimizer makes one for a direct solve: a gradient, no products."""
    return dhf.GlobalOperator(objective, batches, build=GradientGraph)


def gradient(objective: dhf.Objective, batch: Any, kind: str, decay: float) -> Tensor:
    loss = PLAIN[kind][1](objective.module(batch[0]), batch[1])
    found = flat(torch.autograd.grad(loss, list(objective.module.parameters())))
    return found + decay * flat(objective.module.parameters())


def scaled_rows(objective: dhf.Objective, batch: Any, kind: str) -> tuple[Tensor, Tensor]:
    """R and r with loss ½‖r‖², R = ∂r/∂θ."""
    x, y = batch
    z, J = module_outputs(objective.module, x), dense_jacobian(objective.module, x)
    scale = math.sqrt(2 / z.numel()) if kind == "mse" else 1 / math.sqrt(len(x))
    return scale * J, scale * (z - y if kind == "mse" else z).flatten()


# matrices


@pytest.mark.parametrize("kind", list(PLAIN))
@pytest.mark.parametrize("sizes", [[7], [2, 4, 1]])
def test_parameter_space_is_the_dense_gauss_newton_matrix(kind: str, sizes: list[int]) -> None:
    objective, batch = setting(kind, decay=0.3)
    with operator_of(objective, split(batch, sizes)) as operator:
        G = NormalMatrix(operator, in_samples=False)
    assert relative_error(G.matrix, dense_gauss_newton(objective.module, batch, PLAIN[kind][1])) < 1e-11
    assert relative_error(G.right, -gradient(objective, batch, kind, 0.3)) < 1e-11
    assert G.shift == 0.3
    assert (G.rows, G.right_rows) == (None, None)


@pytest.mark.parametrize("model", ["cnn", "attention", "encoder", "layernorm", "embedding"])
def test_of_other_models(model: str) -> None:
    objective, batch = setting("cross_entropy", model=model)
    with operator_of(objective, split(batch, [3, 4])) as operator:
        G = NormalMatrix(operator, in_samples=False)
    assert relative_error(G.matrix, dense_gauss_newton(objective.module, batch, PLAIN["cross_entropy"][1])) < 1e-10


@pytest.mark.parametrize("kind", SQUARES)
@pytest.mark.parametrize("sizes", [[7], [2, 4, 1]])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_sample_space_holds_scaled_rows(kind: str, sizes: list[int], decay: float) -> None:
    objective, batch = setting(kind, decay)
    R, r = scaled_rows(objective, batch, kind)
    with operator_of(objective, split(batch, sizes)) as operator:
        K = NormalMatrix(operator, in_samples=True)
    assert relative_error(K.matrix, R @ R.T) < 1e-11
    assert relative_error(K.rows, R) < 1e-11
    assert relative_error(K.right_rows, -r) < 1e-11
    torch.testing.assert_close(K.right, -decay * flat(objective.module.parameters()))
    assert K.shift == decay


@pytest.mark.parametrize("kind", ["mse", "cross_entropy", "bce sum"])
@pytest.mark.parametrize("held", [1, 2, 5])
def test_rows_are_added_up_piece_by_piece(kind: str, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dhf.operator.normal_matrix._CHUNK_BYTES", held * 8 * 43 * CLASSES)
    objective, batch = setting(kind)
    with operator_of(objective, split(batch, [6, 1])) as operator:
        G = NormalMatrix(operator, in_samples=False)
    assert relative_error(G.matrix, dense_gauss_newton(objective.module, batch, PLAIN[kind][1])) < 1e-11


@pytest.mark.parametrize("held", [1, 3, 100])
def test_class_weights_and_ignored_samples(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dhf.operator.normal_matrix._CHUNK_BYTES", held * 8 * 43 * CLASSES)
    module, (x, y) = problem("mlp")[0].module, problem("mlp", "cross_entropy", samples=9)[1]
    y[::2] = -100
    y[5] = -100
    weight = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    loss = nn.CrossEntropyLoss(weight)
    with operator_of(dhf.Objective(module, loss), split((x, y), [4, 5])) as operator:
        G = NormalMatrix(operator, in_samples=False)
    assert relative_error(G.matrix, dense_gauss_newton(module, (x, y), loss)) < 1e-11


def test_residuals_of_shape_n() -> None:
    class Points(dhf.LeastSquares):
        def outputs(self, batch: Any) -> Tensor:
            return self.module(batch[0])[:, 0] - batch[1][:, 0]

    objective, batch = problem("mlp", "mse")
    J = dense_jacobian(objective.module, batch[0])[::CLASSES]
    with operator_of(Points(objective.module), split(batch, [3, 4])) as operator:
        G, K = (NormalMatrix(operator, in_samples=s) for s in (False, True))
    assert relative_error(G.matrix, J.T @ J / 7) < 1e-11
    assert relative_error(K.matrix, J @ J.T / 7) < 1e-11


def test_float32() -> None:
    objective, (x, y) = setting("cross_entropy")
    truth = dense_gauss_newton(objective.module, (x, y), PLAIN["cross_entropy"][1])
    objective.module.float()
    with operator_of(objective, [(x.float(), y)]) as operator:
        G = NormalMatrix(operator, in_samples=False)
    assert G.matrix.dtype == torch.float32
    assert relative_error(G.matrix.double(), truth) < 1e-5


# solves


@pytest.mark.parametrize("kind", list(PLAIN))
@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("damping", [1e-4, 0.1])
def test_direct_solves_in_parameter_space(kind: str, decay: float, damping: float) -> None:
    objective, batch = setting(kind, decay)
    G = dense_gauss_newton(objective.module, batch, PLAIN[kind][1], decay) + damping * torch.eye(43).double()
    b = -gradient(objective, batch, kind, decay)
    with operator_of(objective, split(batch, [3, 4])) as operator:
        solution = Direct(NormalMatrix(operator, in_samples=False)).solve(damping)
    x = solution.x
    assert solution.reason is dhf.Reason.RESIDUAL_TOLERANCE
    assert relative_error(x, torch.linalg.solve(G, b)) < 1e-8
    assert solution.model == pytest.approx(float(0.5 * x @ G @ x - b @ x), rel=1e-9)
    assert solution.true_residual_norm <= 1e-12 * float(b.norm() + x.norm())
    assert solution.iterations == 1


@pytest.mark.parametrize("kind", SQUARES)
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_both_spaces_give_the_same_step(kind: str, decay: float) -> None:
    objective, batch = setting(kind, decay)
    R, r = scaled_rows(objective, batch, kind)
    theta = flat(objective.module.parameters())
    with operator_of(objective, split(batch, [3, 4])) as operator:
        by_parameters, by_samples = (Direct(NormalMatrix(operator, in_samples=s)) for s in (False, True))
    for damping in (0.1, 1e-3, 10.0):
        roots = math.sqrt(decay), math.sqrt(damping)
        stacked = np.vstack([R.numpy(), roots[0] * np.eye(43), roots[1] * np.eye(43)])
        right = np.concatenate([-r.numpy(), -roots[0] * theta.numpy(), np.zeros(43)])
        truth = torch.from_numpy(np.linalg.lstsq(stacked, right, rcond=None)[0])
        one, other = by_parameters.solve(damping), by_samples.solve(damping)
        for solution in (one, other):
            assert solution.reason is dhf.Reason.RESIDUAL_TOLERANCE
            assert relative_error(solution.x, truth) < 1e-8
        assert relative_error(one.x, other.x) < 1e-8
        assert one.model == pytest.approx(other.model, rel=1e-9)


@pytest.mark.parametrize("kind", SQUARES)
def test_without_damping_both_spaces_give_the_least_norm_step(kind: str) -> None:
    objective, batch = setting(kind)
    R, r = scaled_rows(objective, batch, kind)
    truth = torch.from_numpy(np.linalg.lstsq(R.numpy(), -r.numpy(), rcond=1e-12)[0])
    with operator_of(objective, [batch]) as operator:
        for in_samples in (False, True):
            solution = Direct(NormalMatrix(operator, in_samples=in_samples)).solve(0.0)
            assert solution.reason is dhf.Reason.RESIDUAL_TOLERANCE  # the gradient is a combination of rows
            assert relative_error(solution.x, truth) < 1e-5


# collectives and refusals


@pytest.mark.parametrize(("in_samples", "collectives"), [(False, 1), (True, 2)])
def test_collectives(in_samples: bool, collectives: int) -> None:
    objective, batch = setting("mse")
    with operator_of(objective, split(batch, [3, 4])) as operator:
        before = operator.comm.collectives
        system = Direct(NormalMatrix(operator, in_samples=in_samples))
        for damping in (0.1, 0.2, 0.3):
            system.solve(damping)
        assert operator.comm.collectives - before == collectives


@pytest.mark.parametrize("in_samples", [False, True])
@pytest.mark.parametrize("loss", ["soft_margin", "smooth l1"])
def test_losses_without_a_known_output_hessian_are_refused(loss: str, in_samples: bool) -> None:
    objective, batch = problem("mlp", "mse" if loss == "smooth l1" else loss)
    if loss == "smooth l1":
        objective = dhf.Objective(objective.module, nn.SmoothL1Loss())
    words = "a sum of squares" if in_samples else "a loss with a known output Hessian"
    with (
        operator_of(objective, [batch]) as operator,
        pytest.raises(dhf.UsageError, match=f"direct needs {words}.*solve with cg"),
    ):
        NormalMatrix(operator, in_samples=in_samples)


def test_cross_entropy_has_no_sample_space() -> None:
    objective, batch = setting("cross_entropy")
    with operator_of(objective, [batch]) as operator, pytest.raises(dhf.UsageError, match="a sum of squares"):
        NormalMatrix(operator, in_samples=True)


class Nabla(dhf.LeastSquares):
    """A physics-informed residual by nested autograd."""

    def outputs(self, batch: Any) -> Tensor:
        x = batch[0].detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(self.module(x).sum(), x, create_graph=True)
        return slope[:, 0] - batch[1][:, 0]


@pytest.mark.parametrize("in_samples", [False, True])
@pytest.mark.parametrize("what", ["nested autograd", "dropout", "normalisation"])
@pytest.mark.filterwarnings("ignore:submodule")
def test_what_vmap_cannot_enter_is_refused(what: str, in_samples: bool) -> None:
    objective, batch = problem("mlp", "mse")
    if what == "nested autograd":
        objective = Nabla(objective.module)
    else:
        layer = nn.Dropout(0.5) if what == "dropout" else nn.BatchNorm1d(CLASSES).double()
        objective = dhf.Objective(nn.Sequential(objective.module, layer), nn.MSELoss())
    with (
        operator_of(objective, [batch]) as operator,
        pytest.raises(PerSampleError, match="outputs cannot be differentiated sample by sample"),
    ):
        NormalMatrix(operator, in_samples=in_samples)


def test_samples_that_depend_on_one_another_are_refused() -> None:
    class Centred(dhf.Objective):
        def outputs(self, batch: Any) -> Tensor:
            z = self.module(batch[0])
            return z - z.mean(0)

    objective, batch = problem("mlp", "mse")
    with operator_of(Centred(objective.module, nn.MSELoss()), [batch]) as operator:
        with pytest.raises(PerSampleError, match="not independent"):
            NormalMatrix(operator, in_samples=False)
        NormalMatrix(operator, in_samples=False, verify=False)


def test_a_closed_operator_is_refused() -> None:
    objective, batch = setting("mse")
    with operator_of(objective, [batch]) as operator:
        pass
    with pytest.raises(dhf.StaleGraphError, match="closed"):
        NormalMatrix(operator, in_samples=False)
