"""Products by recordings, plain and compiled: against dense float64 matrices, and what cannot be recorded."""

from __future__ import annotations

import gc
import itertools
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dhf
from dhf.curvature import Retention
from dhf.curvature.traced import builders, program
from tests.distributed.test_parity import compare
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

aten = torch.ops.aten
KINDS = {"hessian": dhf.Hessian, "gauss_newton": dhf.GaussNewton}


@pytest.fixture(autouse=True)
def nothing_is_retained() -> Iterator[None]:
    """Whoever expects products to be retained catches the warning that says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="products are retained")
        yield


def truth(kind: str, objective: dhf.Objective, batch: Any, loss: str) -> Tensor:
    function = dense_hessian if kind == "hessian" else dense_gauss_newton
    return function(objective.module, batch, LOSSES[loss][1], decay=objective.weight_decay)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("model", "loss"), list(itertools.product(MODELS, LOSSES)))
def test_products_are_those_of_the_dense_matrix(kind: str, model: str, loss: str) -> None:
    objective, batch = problem(model, loss, weight_decay=0.3)
    with KINDS[kind](objective, split(batch, [2, 3, 2]), products="traced") as A:
        assert relative_error(dense(A), truth(kind, objective, batch, loss)) < 1e-9


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "bce"])
def test_the_fisher_matrix_has_the_same_labels(loss: str) -> None:
    objective, batch = problem("mlp", loss)
    with dhf.Fisher(objective, [batch], seed=3) as A, dhf.Fisher(objective, [batch], seed=3, products="traced") as B:
        assert relative_error(dense(B), dense(A)) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_the_objective(kind: str) -> None:
    objective, batch = problem("cnn", "cross_entropy", weight_decay=0.3)
    with KINDS[kind](objective, [batch], products="traced") as A, KINDS[kind](objective, [batch]) as B:
        assert A.loss == pytest.approx(B.loss, rel=1e-13)
        assert relative_error(A.gradient, B.gradient) < 1e-12


def test_a_recording_serves_other_parameters_and_data() -> None:
    objective, _ = problem("mlp", "cross_entropy")
    for seed in range(3):
        other, batch = problem("mlp", "cross_entropy", seed=seed)
        objective.module.load_state_dict(other.module.state_dict())
        with dhf.Hessian(objective, [batch], products="traced") as A:
            assert relative_error(dense(A), truth("hessian", other, batch, "cross_entropy")) < 1e-9
    assert recorded(objective) == 1


def recorded(objective: dhf.Objective) -> int:
    return len(builders._programs[objective])


def test_one_recording_for_each_shape() -> None:
    objective, batch = problem("mlp", "mse", samples=10)
    optimizer = dhf.HessianFree(objective, preset="deep-net", products="traced")
    for _ in range(3):
        optimizer.step(split(batch, [4, 4, 2]))
    assert recorded(objective) == 2


def test_a_recording_goes_with_its_objective() -> None:
    objective, batch = problem("mlp", "mse")
    with dhf.GaussNewton(objective, [batch], products="traced") as A:
        A @ A.gradient
    module = weakref.ref(objective.module)
    del objective, A
    gc.collect()
    assert module() is None


def test_targets_that_are_the_inputs_once_may_be_others_later() -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4)).double()
    objective = dhf.Objective(module, nn.MSELoss())
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    for batch in ((x, x), (x, y)):
        with dhf.Hessian(objective, [batch], products="traced") as A, dhf.Hessian(objective, [batch]) as B:
            assert relative_error(dense(A), dense(B)) < 1e-12


class Scaled(nn.Module):
    """A tanh layer whose outputs are scaled, by a buffer or a number."""

    def __init__(self, scale: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).double()
        if isinstance(scale, Tensor):
            self.register_buffer("scale", scale)
        else:
            self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) * self.scale


def compare_with_retained(objective: dhf.Objective, batch: Any, **options: Any) -> None:
    for kind in KINDS.values():
        with kind(objective, [batch], products="traced", **options) as A, kind(objective, [batch], **options) as B:
            assert relative_error(dense(A), dense(B)) < 1e-10


def test_a_buffer_is_read_as_it_is() -> None:
    module, batch = Scaled(torch.tensor(1.0, dtype=torch.float64)), problem("mlp", "mse")[1]
    objective = dhf.Objective(module, nn.MSELoss())
    compare_with_retained(objective, batch)
    module.scale.fill_(3.0)
    compare_with_retained(objective, batch)
    assert recorded(objective) == 2  # one for each kind of matrix


@pytest.mark.parametrize("kind", KINDS)
def test_an_objective_that_is_not_as_it_was_recorded_is_found_out(kind: str) -> None:
    module, batch = Scaled(1.0), problem("mlp", "mse")[1]
    objective = dhf.Objective(module, nn.MSELoss())
    with KINDS[kind](objective, [batch], products="traced"):
        pass
    module.scale = 1.5
    with (
        pytest.warns(UserWarning, match="retained, not traced, since the objective gives other numbers"),
        KINDS[kind](objective, [batch], products="traced") as A,
        KINDS[kind](objective, [batch]) as B,
    ):
        assert relative_error(dense(A), dense(B)) < 1e-12


class BackwardInNumpy(torch.autograd.Function):
    """A sine whose slope is computed where no recording sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return slope * torch.from_numpy(np.cos(x.detach().numpy()))


def test_what_is_computed_past_torch_is_found_out_at_other_parameters() -> None:
    class Sine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return BackwardInNumpy.apply(self.layer(x))

    objective, batch = dhf.Objective(Sine(), nn.MSELoss()), problem("mlp", "mse")[1]
    with dhf.GaussNewton(objective, [batch], products="traced"):
        pass
    with torch.no_grad():
        objective.module.layer.weight.mul_(2.0)
    with (
        pytest.warns(UserWarning, match="gives other numbers"),
        dhf.GaussNewton(objective, [batch], products="traced") as A,
        dhf.GaussNewton(objective, [batch]) as B,
    ):
        assert torch.equal(dense(A), dense(B))


def test_operations_in_place_on_what_the_module_has_made() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            h[:, :2] *= 2.0
            y = h.sin()
            y += 1
            return self.head(F.softplus(y).add_(x))

    compare_with_retained(dhf.Objective(InPlace().double(), nn.MSELoss()), problem("mlp", "mse")[1])


class Residual(nn.Module):
    """u'' + u of a small network, by nested autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            u = self.net(x)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return bend + u


def test_outputs_with_derivatives_of_their_own() -> None:
    x = torch.linspace(0, 1, 9, dtype=torch.float64).unsqueeze(1)
    compare_with_retained(dhf.Objective(Residual(), nn.MSELoss()), (x, torch.zeros_like(x)))


def test_cgls_on_recordings() -> None:
    x = torch.linspace(0, 1, 9, dtype=torch.float64).unsqueeze(1)
    batch = x, x.sin()
    losses = {}
    for products in ("retained", "traced"):
        torch.manual_seed(0)
        optimizer = dhf.HessianFree(
            dhf.Objective(Residual(), nn.MSELoss()),
            solver="cgls",
            preconditioner="none",
            damping=1.0,
            products=products,
        )
        losses[products] = [optimizer.step([batch]).loss_after for _ in range(5)]
    assert losses["traced"] == pytest.approx(losses["retained"], rel=1e-9)
    assert losses["traced"][-1] < losses["traced"][0]


# what passes over a recording change


class Unrolled(nn.Module):
    """A tanh cell in a loop, read out at its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.cell, self.head = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            h = torch.tanh(self.entry(x[:, t]) + self.cell(h))
        return self.head(h)


class LastStep(nn.Module):
    """A recurrent layer of torch's, read out at its last step."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


RECURRENT = {
    "loop": Unrolled,
    "rnn": lambda: LastStep(nn.RNN(2, 3, batch_first=True)),
    "gru": lambda: LastStep(nn.GRU(2, 3, batch_first=True)),
    "lstm": lambda: LastStep(nn.LSTM(2, 3, batch_first=True)),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_many_steps_are_joined(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    objective = dhf.Objective(RECURRENT[name]().double(), nn.MSELoss())
    batch = torch.randn(4, 8, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    compare_with_retained(objective, batch)
    joined = operations(objective)
    monkeypatch.setattr(program, "PASSES", [])
    plain = dhf.Objective(objective.module, nn.MSELoss())
    compare_with_retained(plain, batch)
    alone = operations(plain)
    products = (aten.mm.default, aten.addmm.default)
    assert sum(joined[p] for p in products) < 0.7 * sum(alone[p] for p in products)
    assert joined.total() < alone.total()


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm"])
def test_recurrent_layers_in_float32_are_recorded(name: str) -> None:
    """oneDNN's LSTM, which torch takes in float32 on a CPU, could not be."""
    torch.manual_seed(0)
    objective = dhf.Objective(RECURRENT[name](), nn.MSELoss())
    batch = torch.randn(4, 8, 2), torch.randn(4, 2)
    before = torch._C._get_mkldnn_enabled()
    with (
        dhf.GaussNewton(objective, [batch]) as kept,
        dhf.GaussNewton(objective, [batch], products="traced") as recorded,
    ):
        v = torch.ones_like(kept.gradient)
        assert (recorded @ v - kept @ v).norm() < 1e-5 * (kept @ v).norm()
    assert operations(objective).total() > 0
    assert torch._C._get_mkldnn_enabled() == before


def operations(objective: dhf.Objective) -> Counter[Any]:
    """How often each operation is run for a product, over all recordings of an objective."""
    maps = [graph for found in builders._programs[objective].values() for graph in found._program._cut.maps]  # type: ignore
    return Counter(node.target for graph in maps for node in graph.nodes)


CONVOLUTIONS = {
    "strided": nn.Conv2d(2, 3, 3, stride=2, padding=1),
    "odd remainder": nn.Conv2d(2, 3, 2, stride=3),
    "dilated": nn.Conv2d(2, 3, 3, dilation=2, padding=1),
    "oblong": nn.Conv2d(2, 3, (1, 3), stride=(2, 1), padding=(0, 1)),
    "grouped": nn.Conv2d(2, 4, 3, groups=2),
    "without bias": nn.Conv2d(2, 3, 3, bias=False),
    "transposed": nn.ConvTranspose2d(2, 3, 3, stride=2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        width = CONVOLUTIONS[name](torch.zeros(1, 2, 8, 7)).numel()
    layers = [
        nn.Conv2d(1, 2, 3, padding=1),
        nn.Tanh(),
        CONVOLUTIONS[name],
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(width, 2),
    ]
    module = nn.Sequential(*layers).to(torch.float64)
    batch = torch.randn(3, 1, 8, 7, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    v = torch.randn(sum(p.numel() for p in module.parameters()), dtype=torch.float64)
    for kind in KINDS.values():
        with kind(dhf.Objective(module.double(), nn.MSELoss()), [batch]) as A:
            expected = A @ v
        typed = tuple(t.to(dtype) for t in batch)
        with kind(dhf.Objective(module.to(dtype), nn.MSELoss()), [typed], products="traced") as A:
            found = (A @ v.to(dtype)).double()
        assert relative_error(found, expected) < (1e-4 if dtype == torch.float32 else 1e-12)


def test_weight_gradients_of_convolutions_are_taken_by_their_own_kernel() -> None:
    objective = dhf.Objective(nn.Sequential(*[nn.Conv2d(2, 2, 3), nn.Tanh()] * 2).double(), nn.MSELoss())
    with dhf.Hessian(
        objective, [(torch.randn(2, 2, 6, 6).double(), torch.randn(2, 2, 2, 2).double())], products="traced"
    ):
        found = operations(objective)
    assert found[aten.convolution_backward.default] >= 3
    assert not any(target is aten.transpose.int for target in found)


# what cannot be recorded


class Branching(nn.Module):
    """A layer that looks at its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layer(x))
        return y * 2 if y.sum() > 0 else y


class Masked(Branching):
    """A layer whose outputs are chosen by value."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layer(x))
        return y * 2 + y[x[:, 0] > 0].sum()


class Counting(Branching):
    """A layer with a buffer of its own that moves."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return torch.tanh(self.layer(x))


REFUSED = {
    "dropout": (nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), r"draws random numbers"),
    "batchnorm": (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), r"BatchNorm in training mode"),
    "a branch on a value": (Branching(), r"reads a value"),
    "a choice by value": (Masked(), r"shape depends on values"),
    "a moving buffer": (Counting(), r"changes a tensor in place"),
}


@pytest.mark.filterwarnings("ignore:.*training mode")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recorded_is_retained_and_said(name: str) -> None:
    module, words = REFUSED[name]
    module, batch = module.double(), problem("mlp", "mse")[1]
    with pytest.warns(UserWarning, match=f"products are retained, not traced, since the objective .*{words}"):
        A = dhf.GaussNewton(dhf.Objective(module, nn.MSELoss()), [batch], products="traced")
    with A, dhf.GaussNewton(dhf.Objective(module, nn.MSELoss()), [batch]) as B:
        assert torch.equal(dense(A), dense(B))


def test_a_batch_in_which_tensors_cannot_be_found_is_retained() -> None:
    class Pair:
        def __init__(self, x: Tensor, y: Tensor) -> None:
            self.x, self.y = x, y

    class OfPairs(dhf.Objective):
        def outputs(self, batch: Any) -> Tensor:
            return self.module(batch.x)

        def loss(self, outputs: Tensor, batch: Any) -> Tensor:
            return (outputs - batch.y).square().mean()

        def count(self, batch: Any) -> float:
            return len(batch.x)

    objective, (x, y) = problem("mlp", "mse")
    with (
        pytest.warns(UserWarning, match="batches that hold Pair"),
        dhf.Hessian(OfPairs(objective.module), [Pair(x, y)], products="traced") as A,
        dhf.Hessian(objective, [(x, y)]) as B,
    ):
        assert relative_error(dense(A), dense(B)) < 1e-12


def test_shapes_beyond_a_number_are_retained() -> None:
    objective, (x, y) = problem("mlp", "mse", samples=20)
    for samples in range(1, 17):
        with dhf.Hessian(objective, [(x[:samples], y[:samples])], products="traced"):
            pass
    with (
        pytest.warns(UserWarning, match="more than 16 shapes"),
        dhf.Hessian(objective, [(x, y)], products="traced") as A,
        dhf.Hessian(objective, [(x, y)]) as B,
    ):
        assert torch.equal(dense(A), dense(B))
    assert recorded(objective) == 16


def test_an_optimizer_says_it_in_its_notes_once() -> None:
    objective = dhf.Objective(REFUSED["dropout"][0].double(), nn.MSELoss())
    optimizer = dhf.HessianFree(objective, products="traced", preset="deep-net")
    for _ in range(2):
        optimizer.step([problem("mlp", "mse")[1]])
    assert len([note for note in optimizer.notes if "retained, not traced" in note]) == 1


def test_wrong_targets_are_named_as_ever() -> None:
    objective, (x, y) = problem("mlp", "cross_entropy")
    with pytest.raises(dhf.UsageError, match="out of range"):
        dhf.Hessian(objective, [(x, y + 5)], products="traced")
    with dhf.Hessian(objective, [(x, y)], products="traced"), pytest.raises(dhf.UsageError, match="out of range"):
        dhf.Hessian(objective, [(x, y + 5)], products="traced")


def test_an_unknown_way_is_refused() -> None:
    objective, batch = problem("mlp", "mse")
    with pytest.raises(dhf.UsageError, match="'jitted' is unknown; choose from retained, traced, compiled, auto"):
        dhf.Hessian(objective, [batch], products="jitted")
    with pytest.raises(dhf.UsageError, match="products 'jitted' is unknown"):
        dhf.HessianFree(objective, products="jitted")


@pytest.mark.parametrize(("model", "recordings"), [("mlp", 0), ("encoder", 0), ("cnn", 1), ("gru", 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_auto_goes_by_the_layers(kind: str, model: str, recordings: int) -> None:
    objective, batch = problem(model, "cross_entropy")
    with KINDS[kind](objective, [batch], products="auto") as A:
        assert relative_error(dense(A), truth(kind, objective, batch, "cross_entropy")) < 1e-9
    assert len(builders._programs.get(objective, {})) == recordings


def test_auto_retains_without_a_word() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Dropout(0.5), nn.Flatten()).double()
    batch = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with dhf.Hessian(dhf.Objective(module, nn.MSELoss()), [batch], products="auto") as A:
            A @ A.gradient


@pytest.mark.parametrize("retain", ["none", "8kB"])
@pytest.mark.parametrize("kind", KINDS)
def test_recordings_that_are_not_kept(kind: str, retain: str) -> None:
    objective, batch = problem("mlp", "cross_entropy", samples=60)
    with KINDS[kind](objective, split(batch, [20, 20, 20]), products="traced", retain=retain) as A:
        assert A.retained < 3
        assert relative_error(dense(A), truth(kind, objective, batch, "cross_entropy")) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_recording_keeps_is_measured(kind: str) -> None:
    objective, batch = problem("mlp", "cross_entropy", samples=200)
    rates = {}
    for products in ("retained", "traced"):
        policy = Retention(2**40)
        with KINDS[kind](objective, split(batch, [100, 100]), products=products, retain=policy):
            rates[products] = policy.rate
    assert 0 < rates["traced"] < 1.6 * rates["retained"]  # not also the graphs that a recording is made from


# compiled


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_compiled_products_are_those_of_the_dense_matrix(kind: str, model: str) -> None:
    objective, batch = problem(model, "cross_entropy", weight_decay=0.3)
    with KINDS[kind](objective, [batch], products="compiled") as A:
        assert relative_error(dense(A), truth(kind, objective, batch, "cross_entropy")) < 1e-9


@pytest.mark.parametrize("products", ["traced", "compiled"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_twenty_steps_have_the_same_losses(products: str, dtype: torch.dtype, tolerance: float) -> None:
    losses = {}
    for way in ("retained", products):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
        x = torch.randn(64, 6).to(dtype)
        optimizer = dhf.HessianFree(dhf.Objective(module, nn.MSELoss()), preset="deep-net", products=way)
        losses[way] = [optimizer.step([(x, x[:, :3].sin())]).loss_after for _ in range(20)]
        assert not any("retained, not" in note for note in optimizer.notes)
    assert losses[products] == pytest.approx(losses["retained"], rel=tolerance)


def test_where_nothing_can_be_compiled_products_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no C++ compiler found\nand a long story")

    monkeypatch.setattr("torch._inductor.compile", fail)
    objective, batch = problem("mlp", "mse")
    with (
        pytest.warns(UserWarning, match=r"traced, not compiled, since .* \(RuntimeError: no C\+\+ compiler found\)"),
        dhf.Hessian(objective, [batch], products="compiled") as A,
        dhf.Hessian(objective, [batch]) as B,
    ):
        assert relative_error(dense(A), dense(B)) < 1e-12
    assert operations(objective)


def test_what_is_too_long_to_compile_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "_LONGEST", 5)
    objective, batch = problem("mlp", "mse")
    with (
        pytest.warns(UserWarning, match="operations, too many to compile"),
        dhf.Hessian(objective, [batch], products="compiled"),
    ):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("products", ["traced", "compiled"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["mlp", "cnn", "gru", "attention"])
def test_on_a_gpu(kind: str, model: str, products: str) -> None:
    objective, batch = problem(model, "cross_entropy", weight_decay=0.3)
    expected = truth(kind, objective, batch, "cross_entropy")
    objective.module.cuda()
    with KINDS[kind](objective, [tuple(t.cuda() for t in batch)], products=products) as A:
        assert relative_error(dense(A).cpu(), expected) < 1e-9


# over ranks


@pytest.mark.parametrize("options", [{"preset": "deep-net"}, {"curvature": "hessian", "solver": "minres"}], ids=str)
@pytest.mark.parametrize(("size", "shards"), [(2, "uneven"), (3, "empty")])
def test_ranks_train_as_one(size: int, shards: str, options: dict[str, Any]) -> None:
    compare(size, shards, 4, {**options, "products": "traced"}, "bce")
