"""Per-sample Jacobians and squared gradients against one backward pass per row, and what vmap cannot enter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import dhf
from dhf.curvature.per_sample import add_squared_gradients, output_jacobian
from dhf.curvature.shard import MicroBatch
from dhf.errors import PerSampleError
from dhf.evaluation import twice_differentiable
from dhf.objective import select
from dhf.parameters import Parameters
from tests.models import CLASSES, LOSSES, dense_jacobian, flat, module_outputs, problem, relative_error

VMAP_ENTERS = ["mlp", "cnn", "attention", "encoder", "layernorm", "embedding"]


def jacobian_of(objective: dhf.Objective, batch: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """As an operator calls it."""
    with twice_differentiable(objective.module, torch.device("cpu")):
        return output_jacobian(objective, Parameters(objective.module), batch, **options)


def row_by_row(objective: dhf.Objective, batch: Any) -> Tensor:
    """∂ outputs / ∂θ by one backward pass per number, shape (numbers, n)."""
    tensors = [p for p in objective.module.parameters() if p.requires_grad]
    z = objective.outputs(batch).reshape(-1)
    rows = [torch.autograd.grad(number, tensors, retain_graph=True, materialize_grads=True) for number in z]
    return torch.stack([flat(row) for row in rows])


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# Jacobians


@pytest.mark.parametrize("model", VMAP_ENTERS)
def test_rows_are_those_of_the_dense_jacobian(model: str) -> None:
    objective, batch = problem(model)
    J, z = jacobian_of(objective, batch)
    truth = dense_jacobian(objective.module, batch[0])
    assert J.shape == (7, CLASSES, truth.shape[1])
    assert relative_error(J.flatten(0, 1), truth) < 1e-12
    torch.testing.assert_close(z, module_outputs(objective.module, batch[0]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3)])
def test_outputs_of_any_shape(shape: tuple[int, ...]) -> None:
    class Shaped(dhf.Objective):
        def outputs(self, batch: Any) -> Tensor:
            return self.module(batch[0]).view(-1, *shape)

    width = torch.Size(shape).numel()
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, width)).double()
    batch = randn(5, 3), randn(5, *shape)
    J, z = jacobian_of(Shaped(module, nn.MSELoss()), batch)
    assert J.shape == (5, width, 16 + 5 * width)
    assert z.shape == (5, *shape)
    assert relative_error(J.flatten(0, 1), dense_jacobian(module, batch[0])) < 1e-12
    assert torch.equal(z.reshape(5, -1), module_outputs(module, batch[0]))


@pytest.mark.parametrize("samples", [1, 2, 7])
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_chunks_change_nothing(samples: int, chunk_size: int) -> None:
    objective, batch = problem("mlp", samples=samples)
    J, z = jacobian_of(objective, batch, chunk_size=chunk_size)
    assert relative_error(J.flatten(0, 1), dense_jacobian(objective.module, batch[0])) < 1e-12
    assert relative_error(z, module_outputs(objective.module, batch[0])) < 1e-13


def test_parameters_keep_their_gradients_and_values() -> None:
    objective, batch = problem("mlp")
    before = flat(objective.module.parameters())
    jacobian_of(objective, batch)
    assert torch.equal(flat(objective.module.parameters()), before)
    assert all(p.grad is None and p.requires_grad for p in objective.module.parameters())


class Pair(NamedTuple):
    x: Tensor
    scale: Tensor


class Nested(dhf.Objective):
    """Takes inputs, scales per sample, and constants that are not split."""

    def __init__(self, pick: Callable[[Any], tuple[Tensor, Tensor, Tensor]]) -> None:
        super().__init__(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), lambda z, _: z.mean())
        self.pick = pick

    def outputs(self, batch: Any) -> Tensor:
        x, scale, mixing = self.pick(batch)
        return (self.module(x) * scale.unsqueeze(1)) @ mixing


# the mixing matrix (2, 2) and the temperature () are not per sample: no batch here has 2 samples
FORMS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor, Tensor]]]] = {
    "tuple": (lambda x, s, m: (x, s, m), lambda b: b),
    "list": (lambda x, s, m: [x, [s, m]], lambda b: (b[0], *b[1])),
    "dict": (lambda x, s, m: {"x": x, "s": s, "m": m}, lambda b: (b["x"], b["s"], b["m"])),
    "named tuple": (lambda x, s, m: (Pair(x, s), m), lambda b: (b[0].x, b[0].scale, b[1])),
    "nest": (
        lambda x, s, m: {"in": (x, None, "name"), "of": [{"s": s}, torch.tensor(2.0).double()], "m": m},
        lambda b: (b["in"][0], b["of"][0]["s"] * b["of"][1], b["m"]),
    ),
}


@pytest.mark.parametrize("form", list(FORMS))
def test_batches_of_any_form_with_tensors_that_are_not_split(form: str) -> None:
    make, pick = FORMS[form]
    batch = make(randn(5, 3), randn(5), randn(2, 2))
    objective = Nested(pick)
    J, z = jacobian_of(objective, batch)
    assert J.shape == (5, 2, 26)
    assert relative_error(J.flatten(0, 1), row_by_row(objective, batch)) < 1e-12
    assert relative_error(z, objective.outputs(batch).detach()) < 1e-13


class Odd(nn.Module):
    """Frozen, tied, unused and empty parameters together."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.unused, self.empty = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(0, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(self.frozen(x))))) + self.empty.sum()


def test_frozen_tied_unused_and_empty_parameters() -> None:
    module = Odd().double()
    batch = randn(5, 3), randn(5, 3)
    J, _ = jacobian_of(dhf.Objective(module, nn.MSELoss()), batch)
    assert J.shape == (5, 3, 2 + 0 + 9 + 3)
    assert relative_error(J.flatten(0, 1), dense_jacobian(module, batch[0])) < 1e-12
    assert not J[:, :, :2].any()
    assert J[:, :, 2:].any()


def test_float32() -> None:
    objective, (x, y) = problem("mlp")
    truth = dense_jacobian(objective.module, x)
    objective.module.float()
    J, _ = jacobian_of(objective, (x.float(), y.float()))
    assert J.dtype == torch.float32
    assert relative_error(J.flatten(0, 1).double(), truth) < 1e-5


# what cannot be differentiated sample by sample


class Awkward(nn.Module):
    """A linear layer, and then something that vmap or single samples do not bear."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear, self.dropout = kind, nn.Linear(3, 4), nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(4, track_running_stats=kind != "norm without statistics")

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        if self.kind.startswith("norm"):
            return self.norm(h)
        if self.kind == "dropout":
            return self.dropout(h)
        if self.kind == "item":
            return h * h.abs().max().item()
        if self.kind == "branch":
            return h if h.sum() > 0 else -h
        if self.kind == "mean":
            return h - h.mean(0)
        return h


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("norm", r"outputs cannot be differentiated sample by sample.*in-place operation"),
        ("norm without statistics", r"outputs cannot be differentiated sample by sample.*Expected more than 1 value"),
        ("dropout", r"outputs cannot be differentiated sample by sample.*random"),
        ("item", r"outputs cannot be differentiated sample by sample.*\.item\(\)"),
        ("branch", r"outputs cannot be differentiated sample by sample.*control flow"),
        ("mean", r"outputs of a sample alone differ from those in its batch.*not independent"),
    ],
)
def test_refusals_say_what_was_found(kind: str, words: str) -> None:
    objective = dhf.Objective(Awkward(kind).double(), nn.MSELoss())
    with pytest.raises(PerSampleError, match=words):
        jacobian_of(objective, (randn(5, 3), randn(5, 4)))


@pytest.mark.parametrize("kind", ["norm", "dropout"])
def test_in_evaluation_mode_they_are_differentiated(kind: str) -> None:
    module = Awkward(kind).double().eval()
    module.requires_grad_(False)
    module.linear.requires_grad_(True)
    batch = randn(5, 3), randn(5, 4)
    J, _ = jacobian_of(dhf.Objective(module, nn.MSELoss()), batch)
    assert relative_error(J.flatten(0, 1), dense_jacobian(module, batch[0])) < 1e-12


def test_without_verification_rows_that_depend_on_one_another_pass() -> None:
    objective = dhf.Objective(Awkward("mean").double(), nn.MSELoss())
    J, z = jacobian_of(objective, (randn(5, 3), randn(5, 4)), verify=False)
    assert not z.any()  # each sample is its own mean
    assert not J.any()


class Nabla(dhf.LeastSquares):
    """A physics-informed residual, its derivative in the inputs taken by torch.autograd.grad or by torch.func."""

    def __init__(self, how: str) -> None:
        super().__init__(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double())
        self.how = how

    def outputs(self, batch: Any) -> Tensor:
        (x,) = batch
        if self.how == "torch.func":
            slope = torch.func.vmap(torch.func.grad(lambda point: self.module(point)[0]))(x)
        else:
            x = x.detach().requires_grad_(True) if self.how == "detached" else x
            (slope,) = torch.autograd.grad(self.module(x).sum(), x, create_graph=True)
        return slope[:, 0] - self.module(x)[:, 0]


@pytest.mark.parametrize("how", ["detached", "inputs that require gradients"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_nested_autograd_is_refused_by_name(how: str, mode: Any) -> None:
    x = randn(5, 2).requires_grad_(how != "detached")
    with mode(), pytest.raises(PerSampleError, match=r"cannot be differentiated sample by sample.*torch\.func"):
        jacobian_of(Nabla(how), (x,))


def test_nested_torch_func_is_differentiated() -> None:
    objective, batch = Nabla("torch.func"), (randn(5, 2),)
    J, _ = jacobian_of(objective, batch)
    assert J.shape == (5, 1, 17)
    assert relative_error(J[:, 0], row_by_row(objective, batch)) < 1e-12


# squared gradients


def squared_gradients(objective: dhf.Objective, batch: Any, weight: float = 1.0) -> Tensor:
    parameters = Parameters(objective.module)
    found = torch.zeros(parameters.numel, dtype=parameters.dtype)
    part = MicroBatch(batch, len(batch[0]), weight, 0)
    with twice_differentiable(objective.module, torch.device("cpu")):
        add_squared_gradients(objective, parameters, part, found)
    return found


def one_by_one(module: nn.Module, batch: Any, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """∇f_i of every sample, shape (N, n)."""
    tensors = [p for p in module.parameters() if p.requires_grad]
    rows = []
    for i in range(len(batch[0])):
        x, y = select(batch, slice(i, i + 1))
        rows.append(flat(torch.autograd.grad(loss(module(x), y), tensors, materialize_grads=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("model", ["mlp", "embedding"])
def test_squared_gradients_are_those_of_a_loop_over_samples(model: str, loss: str) -> None:
    objective, batch = problem(model, loss)
    truth = 0.3 * one_by_one(objective.module, batch, LOSSES[loss][1]).square().mean(0)
    assert relative_error(squared_gradients(objective, batch, 0.3), truth) < 1e-12


@pytest.mark.parametrize("samples", [1, 63, 64, 65, 130])
def test_squared_gradients_of_more_samples_than_are_held_at_once(samples: int) -> None:
    objective, batch = problem("mlp", "cross_entropy", samples)
    truth = one_by_one(objective.module, batch, LOSSES["cross_entropy"][1]).square().mean(0)
    assert relative_error(squared_gradients(objective, batch), truth) < 1e-12


def test_squared_gradients_are_added() -> None:
    objective, batch = problem("mlp", "mse")
    parameters = Parameters(objective.module)
    found = torch.ones(parameters.numel, dtype=parameters.dtype)
    add_squared_gradients(objective, parameters, MicroBatch(batch, 7, 1.0, 0), found)
    truth = 1 + one_by_one(objective.module, batch, LOSSES["mse"][1]).square().mean(0)
    assert relative_error(found, truth) < 1e-12


def test_squared_gradients_of_frozen_tied_unused_and_empty_parameters() -> None:
    module = Odd().double()
    batch = randn(5, 3), randn(5, 3)
    truth = one_by_one(module, batch, LOSSES["mse"][1]).square().mean(0)
    assert relative_error(squared_gradients(dhf.Objective(module, nn.MSELoss()), batch), truth) < 1e-12


@pytest.mark.parametrize("weighted", [False, True])
def test_samples_count_in_squared_gradients_what_they_count_in_the_loss(weighted: bool) -> None:
    module, (x, y) = problem("mlp", "cross_entropy")[0].module, problem("mlp", "cross_entropy", 70)[1]
    y[::3] = -100
    weight = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64) if weighted else torch.ones(CLASSES).double()
    objective = dhf.Objective(module, nn.CrossEntropyLoss(weight if weighted else None))
    kept = y >= 0
    counts = weight[y[kept]]
    gradients = one_by_one(module, (x[kept], y[kept]), LOSSES["cross_entropy"][1])
    truth = (counts[:, None] * gradients.square()).sum(0) / counts.sum()
    assert relative_error(squared_gradients(objective, (x, y)), truth) < 1e-12


@pytest.mark.parametrize(("kind", "words"), [("norm", "in-place operation"), ("dropout", "random"), ("item", "item")])
def test_squared_gradients_refuse_by_name(kind: str, words: str) -> None:
    objective = dhf.Objective(Awkward(kind).double(), nn.MSELoss())
    with pytest.raises(PerSampleError, match=rf"the loss cannot be differentiated sample by sample.*{words}"):
        squared_gradients(objective, (randn(5, 3), randn(5, 4)))
