"""Graphs kept, rebuilt, or some of each: the same products; and what decides which."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dhf
from dhf.curvature import GaussNewtonGraph, Retention
from dhf.curvature.retention import counting, size_of
from dhf.curvature.shard import ShardCurvature
from dhf.errors import UsageError
from dhf.evaluation import moving_buffers
from dhf.parameters import Parameters
from tests.faults.faulty import hooked
from tests.models import (
    LOSSES,
    MODELS,
    dense,
    dense_gauss_newton,
    dense_hessian,
    problem,
    relative_error,
    split,
)

CURVATURES = {"hessian": dhf.Hessian, "gauss_newton": dhf.GaussNewton, "fisher": dhf.Fisher}


def some(curvature: Any, objective: dhf.Objective, parts: list[Any]) -> int:
    """Bytes in which one graph finds room, besides one that is rebuilt with its product."""
    probe = Retention(2**40)
    product(curvature, objective, parts, probe)
    assert probe.rate is not None
    vectors = 4 * 8 * Parameters(objective.module).numel
    return int(3.5 * probe.rate * max(map(size_of, parts))) + vectors


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("loss", list(LOSSES))
def test_rebuilt_products_are_those_of_the_dense_matrices(model: str, loss: str) -> None:
    objective, batch = problem(model, loss, weight_decay=0.3)
    parts = split(batch, [3, 4])
    with dhf.Hessian(objective, parts, retain="none") as A:
        assert relative_error(dense(A), dense_hessian(objective.module, batch, LOSSES[loss][1], decay=0.3)) < 1e-9
    with dhf.GaussNewton(objective, parts, retain="none") as A:
        truth = dense_gauss_newton(objective.module, batch, LOSSES[loss][1], decay=0.3)
        assert relative_error(dense(A), truth) < 1e-9


class Noisy(nn.Module):
    """Dropout, and statistics that move with every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3)
        ).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def product(curvature: Any, objective: dhf.Objective, parts: list[Any], retention: Retention) -> tuple[Tensor, Any]:
    """A product that has been taken three times, and the operator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of BatchNorm, as it must be
        operator = curvature(objective, parts, retain=retention, seed=3)
    with operator as A:
        v = torch.randn(A.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        first, second, third = A @ v, A @ v, A @ v
        assert torch.equal(first, second)
        assert torch.equal(first, third)
    return first, operator


@pytest.mark.parametrize("retain", ["none", "some", "auto"])
@pytest.mark.parametrize("curvature", [*CURVATURES.values(), dhf.ResidualJacobian], ids=lambda c: c.__name__)
def test_kept_or_rebuilt_is_the_same(curvature: Any, retain: str) -> None:
    torch.manual_seed(5)
    objective = dhf.Objective(Noisy(), nn.MSELoss(), weight_decay=0.1)
    x, y = torch.randn(23, 4).double(), torch.randn(23, 3).double()
    parts = split((x, y), [5, 5, 5, 5, 3])
    truth, kept = product(curvature, objective, parts, Retention("all"))
    before = [b.clone() for b in moving_buffers(objective.module)]
    retention = Retention(some(curvature, objective, parts) if retain == "some" else retain)
    found, rebuilt = product(curvature, objective, parts, retention)
    assert (kept.retained, kept.micro_batches) == (5, 5)
    assert rebuilt.retained == {"none": 0, "some": 1, "auto": 5}[retain]
    assert rebuilt.loss == kept.loss
    assert torch.equal(rebuilt.gradient, kept.gradient)
    assert relative_error(found, truth) < 1e-14
    # the same computation gives the same bits
    retention.forward_mode = False
    assert torch.equal(product(curvature, objective, parts, retention)[0], truth)
    assert all(map(torch.equal, before, moving_buffers(objective.module)))


def test_buffers_move_once_per_step_also_where_graphs_are_rebuilt() -> None:
    moved = []
    for retain in ("all", "none"):
        torch.manual_seed(5)
        objective = dhf.Objective(Noisy(), nn.MSELoss())
        x, y = torch.randn(10, 4).double(), torch.randn(10, 3).double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dhf.HessianFree(objective, retain=retain, seed=1).step(split((x, y), [5, 5]))
        moved.append([b.clone() for b in moving_buffers(objective.module)])
    assert all(map(torch.equal, *moved))


@pytest.mark.parametrize("retain", ["none", "some"])
@pytest.mark.parametrize("options", [{"solver": "cg"}, {"solver": "cgls"}, {"curvature": "hessian"}], ids=str)
def test_steps_are_those_of_kept_graphs(retain: str, options: dict[str, Any]) -> None:
    losses = []
    for policy in ("all", retain):
        objective, batch = problem("mlp", "mse", 14)
        if policy == "some":
            policy = some(dhf.GaussNewton, objective, split(batch, [4, 4, 4, 2]))
        optimizer = dhf.HessianFree(objective, retain=policy, preconditioner="none", **options)
        losses.append([optimizer.step(split(batch, [4, 4, 4, 2])).loss_after for _ in range(4)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-10)
    assert any("micro-batches are kept" in note for note in optimizer.notes)


@pytest.mark.parametrize("curvature", [*CURVATURES.values(), dhf.ResidualJacobian], ids=lambda c: c.__name__)
def test_products_can_be_taken_where_gradients_are_off(curvature: Any) -> None:
    objective, batch = problem("mlp", "mse")
    v = torch.ones(43, dtype=torch.float64)
    with curvature(objective, [batch], retain="none") as A:
        truth = A @ v
        with torch.no_grad():
            assert torch.equal(A @ v, truth)


@pytest.mark.parametrize("retain", ["all", "none"])
def test_residuals_of_rebuilt_rows(retain: str) -> None:
    objective, batch = problem("mlp", "mse", weight_decay=0.2)
    x = torch.linspace(-1, 1, 43, dtype=torch.float64)
    with dhf.ResidualJacobian(objective, split(batch, [4, 3]), retain=retain) as A, torch.no_grad():
        residual = A.residual(x)[0].clone()
        assert relative_error(residual, -A.gradient - A @ x) < 1e-12


# forward mode


class Hidden(nn.Module):
    """A scale that backward passes do not see, and forward ones would."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x)
        with torch.no_grad():
            scale = z.abs().mean()
        return z / scale


class Hooked(nn.Module):
    """Something that has no forward derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return hooked(self.linear(x).tanh(), lambda z: z)


class Nested(nn.Module):
    """Slopes by autograd within the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(self.layers(x).sum(), x, create_graph=True)[0][:, :3]


class Cube(torch.autograd.Function):
    """Has derivatives of any order, none of them forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * cotangent


class Backward(nn.Module):
    """Calls what has no forward derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(self.linear(x))


class Long(nn.Module):
    """Has time steps."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.view(-1, 2, 2))[0][:, -1]


@pytest.mark.parametrize(
    ("module", "forward"), [(Hidden, False), (Hooked, False), (Long, None), (Nested, None), (Noisy, True)]
)
def test_derivatives_are_carried_forward_only_where_that_is_right(
    module: type[nn.Module], forward: bool | None
) -> None:
    torch.manual_seed(2)
    objective = dhf.Objective(module(), nn.MSELoss())
    parts = split((torch.randn(12, 4).double(), torch.randn(12, 3).double()), [6, 6])
    truth, _ = product(dhf.GaussNewton, objective, parts, Retention("all"))
    retention = Retention("none")
    found, _ = product(dhf.GaussNewton, objective, parts, retention)
    assert relative_error(found, truth) < 1e-13
    assert retention.forward_mode in (True, False)
    assert forward is None or retention.forward_mode is forward


def test_a_module_without_forward_derivative_is_differentiated_twice() -> None:
    objective = dhf.Objective(Backward(), nn.MSELoss())
    parts = split((torch.randn(12, 4), torch.randn(12, 3)), [6, 6])
    found = {}
    for retain in ("all", "none"):
        retention = Retention(retain)
        with dhf.GaussNewton(objective, parts, retain=retention) as A:
            found[retain] = A @ torch.ones(A.shape[0])
    assert retention.forward_mode is False
    assert torch.equal(found["none"], found["all"])


def test_a_builder_without_along_is_rebuilt_from_scratch() -> None:
    objective, batch = problem("mlp", "mse")
    parameters, made = Parameters(objective.module), []

    def build(*arguments: Any) -> GaussNewtonGraph:
        made.append(1)
        return GaussNewtonGraph(*arguments)

    shard = ShardCurvature(objective, parameters, [batch], [0], build, retention=Retention("none"))
    shard.begin(shard.count, 0)
    out = torch.empty(parameters.numel, dtype=torch.float64)
    v = torch.ones_like(out)
    shard.product(v, out)
    shard.product(v, out)
    assert len(made) == 3
    with dhf.GaussNewton(objective, [batch]) as A:
        assert torch.equal(out, A @ v)


def test_an_objective_that_changes_with_each_evaluation_is_refused() -> None:
    class Restless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.passes = nn.Linear(4, 3).double(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            return self.linear(x) * self.passes

    objective = dhf.Objective(Restless(), nn.MSELoss())
    batch = torch.randn(4, 4).double(), torch.randn(4, 3).double()
    with (
        dhf.Hessian(objective, [batch], retain="none") as A,
        pytest.raises(UsageError, match="something in the module changes with each forward pass"),
    ):
        A @ torch.ones(A.shape[0], dtype=torch.float64)


# accounting


def test_what_is_counted_is_what_graphs_save() -> None:
    """An elementwise chain of known size: exp saves its result, and nothing else is kept by its gradient's graph."""
    objective, _ = problem("mlp", "mse")
    x = torch.randn(1000, requires_grad=True, dtype=torch.float64)
    with counting(objective, x) as storages:
        y = x.exp().exp()
    assert storages.nbytes == 2 * 8000
    del y


def test_outputs_that_carry_slopes_forward_can_be_measured() -> None:
    """Forward mode saves the zero slopes of hidden weights as tensors that have no storage."""

    class Slope(dhf.LeastSquares):
        def outputs(self, batch: Tensor) -> Tensor:
            u, slope = torch.func.jvp(self.module, (batch,), (torch.ones_like(batch),))
            return slope + u

    network = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    t = torch.linspace(0, 1, 12, dtype=torch.float64).view(-1, 1)
    v = torch.ones(Parameters(network).numel, dtype=torch.float64)
    with dhf.GaussNewton(Slope(network), [t]) as whole, dhf.GaussNewton(Slope(network), list(t.split(5))) as parts:
        assert relative_error(parts @ v, whole @ v) < 1e-12


def test_sizes_are_those_of_all_tensors_in_a_batch() -> None:
    batch = {"a": torch.zeros(3, 4), "b": (torch.zeros(3), "text", [torch.zeros(2, 2)])}
    assert size_of(batch) == 12 + 3 + 4
    assert size_of("no tensors") == 1


def test_room_for_graphs() -> None:
    sizes = [10] * 8
    assert Retention("all").room(sizes) == float("inf")
    assert Retention("none").room(sizes) == 0
    within = Retention(4000)
    assert within.wants_measuring(sizes)
    within.measured(10, 1000)
    assert not within.wants_measuring(sizes)
    assert within.room(sizes) == pytest.approx(20)  # a rebuilt graph and its product take two
    assert within.peak(sizes) == (2, pytest.approx(4000))
    assert within.room([10] * 3) == float("inf")
    assert within.peak([10] * 3) == (3, pytest.approx(4000))
    within.shrink(10)
    assert within.room(sizes) == 10
    assert within.room([10] * 3) == 10


def test_a_lone_micro_batch_is_kept_without_measuring() -> None:
    retention = Retention("auto")
    objective, batch = problem("mlp", "mse")
    with dhf.Hessian(objective, [batch], retain=retention) as A:
        assert (A.retained, A.micro_batches) == (1, 1)
    assert (retention.rate, retention.budget) == (None, None)


@pytest.mark.parametrize("retain", ["some", "2 gigs", -1, 1.5, "-3"])
def test_unknown_policies_are_refused(retain: Any) -> None:
    objective, batch = problem("mlp", "mse")
    with pytest.raises(UsageError, match=r"give all, none, auto, or a size such as 2GiB"):
        dhf.Hessian(objective, [batch], retain=retain)
    with pytest.raises(UsageError, match=r"give all, none, auto, or a size such as 2GiB"):
        dhf.HessianFree(objective, retain=retain)


@pytest.mark.parametrize(("text", "size"), [("2GiB", 2**31), ("500MB", 500_000_000), ("1e6", 10**6), (7, 7)])
def test_sizes_as_people_write_them(text: Any, size: int) -> None:
    assert Retention(text).budget == size
