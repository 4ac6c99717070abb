"""Kronecker factors against loops over single samples and places, and against Fisher blocks that they hold exactly."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dhf
from dhf.curvature.fisher import uniforms
from dhf.curvature.kronecker import add_factors, factor_shapes, layers_of
from dhf.curvature.shard import MicroBatch
from dhf.evaluation import twice_differentiable
from dhf.parameters import Parameters
from tests.models import CLASSES, LOSSES, dense_gauss_newton, flat, module_outputs, problem, relative_error

LABELLED = ["mse", "cross_entropy", "bce"]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def factors(
    objective: dhf.Objective, parts: list[MicroBatch], seed: int = 0
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """(A, G) of every layer, A divided by its places, and the mean gradient."""
    parameters = Parameters(objective.module)
    layers = layers_of(objective, parameters)
    out = [torch.zeros(shape, dtype=parameters.dtype) for shape in factor_shapes(layers, parameters)]
    for part in parts:
        with twice_differentiable(objective.module, torch.device("cpu")):
            add_factors(objective, parameters, layers, seed, part, out)
    *pairs, places, gradient = out
    return [(A / p, G) for A, G, p in zip(pairs[::2], pairs[1::2], places, strict=True)], gradient


def whole(batch: Any) -> list[MicroBatch]:
    return [MicroBatch(batch, len(batch[0]), 1.0, 0)]


def sampled_slopes(objective: dhf.Objective, z: Tensor, y: Tensor, seed: int = 0) -> Tensor:
    """∂(-log p(ŷ|z))/∂z of every sample, by the labels' own stream."""
    loss = objective.known_loss()
    return loss.sampled_gradients(z, y, uniforms(seed, 0, len(z), loss.draws(z)))


def patches(conv: nn.Conv2d, a: Tensor) -> list[Tensor]:
    """What each output pixel of one image sees, pixel by pixel."""
    if conv.padding == "same":
        (h, w) = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        a = F.pad(a, (w // 2, w - w // 2, h // 2, h - h // 2))
    elif conv.padding != "valid":
        a = F.pad(a, (conv.padding[1],) * 2 + (conv.padding[0],) * 2)
    _, channels, height, width = a.shape
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    found = []
    for top in range(0, height - dh * (kh - 1), sh):
        for left in range(0, width - dw * (kw - 1), sw):
            seen = [
                a[0, c, top + i * dh, left + j * dw]
                for c, i, j in itertools.product(range(channels), range(kh), range(kw))
            ]
            found.append(torch.stack(seen))
    return found


def places_of(layer: nn.Module, a: Tensor, z: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """A layer's inputs and outputs for one sample, place by place."""
    if isinstance(layer, nn.Conv2d):
        return patches(layer, a), list(z[0].flatten(1).T)
    return list(a.reshape(-1, a.shape[-1])), list(z.reshape(-1, z.shape[-1]))


def looped_factors(objective: dhf.Objective, batch: Any, layers: list[nn.Module], bias: bool) -> tuple[Tensor, Tensor]:
    """A and G of one weight by loops over samples, the calls of its layers, and places; checks z = W a at every place."""
    x, y = batch
    c = sampled_slopes(objective, module_outputs(objective.module, x), y)
    inputs, slopes = [], []
    for i in range(len(x)):
        calls: list[tuple[nn.Module, Tensor, Tensor]] = []
        hooks = [
            layer.register_forward_hook(lambda layer, a, z, calls=calls: calls.append((layer, a[0].detach(), z)))
            for layer in set(layers)
        ]
        output = objective.module(x[i : i + 1])
        for hook in hooks:
            hook.remove()
        gradients = torch.autograd.grad(output, [z for *_, z in calls], c[i : i + 1])
        for (layer, a, z), g in zip(calls, gradients, strict=True):
            (seen, made), (_, slope) = places_of(layer, a, z.detach()), places_of(layer, a, g)
            for patch, out in zip(seen, made, strict=True):
                b = 0.0 if layer.bias is None else layer.bias.detach()
                torch.testing.assert_close(layer.weight.detach().flatten(1) @ patch + b, out)
                inputs.append(torch.cat([patch, torch.ones(1).double()]) if bias else patch)
            slopes += slope
    A, g = torch.stack(inputs), torch.stack(slopes)
    return A.T @ A / len(A), g.T @ g / len(x)


def assert_factors(objective: dhf.Objective, batch: Any, wanted: list[tuple[list[nn.Module], bool]]) -> None:
    found, _ = factors(objective, whole(batch))
    assert len(found) == len(wanted)
    for (A, G), (layers, bias) in zip(found, wanted, strict=True):
        true_A, true_G = looped_factors(objective, batch, layers, bias)
        assert A.shape == true_A.shape
        assert relative_error(A, true_A) < 1e-11
        assert relative_error(G, true_G) < 1e-11


# layers


@pytest.mark.parametrize("loss", LABELLED)
def test_factors_of_linear_layers(loss: str) -> None:
    objective, batch = problem("mlp", loss)
    first, _, second = objective.module
    assert_factors(objective, batch, [([first], True), ([second], True)])


def test_labels_are_those_of_the_seed() -> None:
    objective, batch = problem("mlp", "cross_entropy")
    G0, G3 = (factors(objective, whole(batch), seed)[0][1][1] for seed in (0, 3))
    c = sampled_slopes(objective, module_outputs(objective.module, batch[0]), batch[1], 3)
    assert relative_error(G3, c.T @ c / 7) < 1e-12  # the last layer's slopes are those of the outputs
    assert relative_error(G0, c.T @ c / 7) > 1e-3


def test_mean_gradient_is_that_of_the_sampled_labels() -> None:
    objective, (x, y) = problem("mlp", "bce")
    _, gradient = factors(objective, whole((x, y)))
    z = objective.module(x)
    c = sampled_slopes(objective, z.detach(), y)
    truth = torch.autograd.grad((z * c).sum() / 7, list(objective.module.parameters()))
    assert relative_error(gradient, flat(truth)) < 1e-12


@pytest.mark.parametrize("bias", ["none", "frozen", "trained"])
def test_bias(bias: str) -> None:
    module = nn.Sequential(nn.Linear(4, 5, bias=bias != "none"), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    if bias == "frozen":
        module[0].bias.requires_grad_(False)
    objective = dhf.Objective(module, nn.MSELoss())
    batch = randn(6, 4), randn(6, CLASSES)
    (first, second) = layers_of(objective, Parameters(module))
    assert (first.weight, first.bias) == (0, 1 if bias == "trained" else None)
    assert first.sizes == (5 if bias == "trained" else 4, 5)
    assert second.bias == second.weight + 1
    assert_factors(objective, batch, [([module[0]], bias == "trained"), ([module[2]], True)])


class Sequence(nn.Module):
    """Linear layers over time steps, then one over their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.head = nn.Linear(3, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.step(x)).cumsum(1).mean(1))


@pytest.mark.parametrize("loss", LABELLED)
def test_linear_layer_at_several_places(loss: str) -> None:
    module = Sequence().double()
    objective = dhf.Objective(module, LOSSES[loss][0])
    batch = randn(5, 6, 3), LOSSES[loss][2](5)
    assert_factors(objective, batch, [([module.step], True), ([module.head], True)])


class Repeated(nn.Module):
    """One layer called twice, its second call named by keyword; or two layers with one weight."""

    def __init__(self, tied: bool, biases: bool = True) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4, bias=biases)
        self.two = nn.Linear(4, 4, bias=biases) if tied else self.one
        if tied:
            self.two.weight = self.one.weight
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


def test_layer_called_twice() -> None:
    module = Repeated(tied=False).double()
    batch = randn(5, 4), randn(5, CLASSES)
    assert_factors(dhf.Objective(module, nn.MSELoss()), batch, [([module.one], True), ([module.head], True)])


@pytest.mark.parametrize("biases", ["none", "own", "shared"])
def test_tied_weights_are_one_layer(biases: str) -> None:
    module = Repeated(tied=True, biases=biases != "none").double()
    if biases == "shared":
        module.two.bias = module.one.bias
    batch = randn(5, 4), randn(5, CLASSES)
    # two biases cannot stand in one block
    wanted = [([module.one, module.two], biases == "shared"), ([module.head], True)]
    assert_factors(dhf.Objective(module, nn.MSELoss()), batch, wanted)


def test_bias_of_two_layers_stands_in_one_block() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    module[2].bias = module[0].bias
    found = layers_of(dhf.Objective(module, nn.MSELoss()), Parameters(module))
    assert [layer.bias for layer in found] == [1, None]


def test_input_given_by_name() -> None:
    class Named(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](input=x)

    module = Named(nn.Linear(4, CLASSES)).double()
    batch = randn(5, 4), randn(5, CLASSES)
    (A, _), *_ = factors(dhf.Objective(module, nn.MSELoss()), whole(batch))[0]
    a = torch.cat([batch[0], torch.ones(5, 1).double()], 1)
    assert relative_error(A, a.T @ a / 5) < 1e-12


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": (2, 1)},
    "padding": {"padding": (1, 2)},
    "valid": {"padding": "valid"},
    "same": {"padding": "same"},
    "same, dilated": {"padding": "same", "dilation": (1, 2)},
    "dilation": {"dilation": (2, 1), "padding": 1},
    "all": {"stride": 2, "padding": (2, 1), "dilation": (1, 2)},
    "without bias": {"bias": False},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", list(CONVOLUTIONS))
@pytest.mark.parametrize("kernel", [(3, 2), (1, 3)])
def test_factors_of_convolutions(kind: str, kernel: tuple[int, int]) -> None:
    options = CONVOLUTIONS[kind]
    body = nn.Sequential(nn.Conv2d(2, 3, kernel, **options), nn.Tanh(), nn.Flatten()).double()
    x = randn(3, 2, 5, 6)
    module = body.append(nn.Linear(body(x).shape[1], CLASSES).double())
    wanted = [([module[0]], options.get("bias", True)), ([module[3]], True)]
    assert_factors(dhf.Objective(module, nn.CrossEntropyLoss()), (x, torch.randint(0, CLASSES, (3,))), wanted)


def test_tied_convolutions_each_keep_their_own_geometry() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=2, dilation=2, stride=2)
            self.two.weight, self.two.bias = self.one.weight, self.one.bias
            self.head = nn.Linear(2, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))).mean((2, 3)))

    module = Two().double()
    batch = randn(4, 2, 5, 5), randn(4, CLASSES)
    wanted = [([module.one, module.two], True), ([module.head], True)]
    assert_factors(dhf.Objective(module, nn.MSELoss()), batch, wanted)


@pytest.mark.parametrize("layer", ["linear", "sequence", "convolution"])
def test_activations_in_place_do_not_change_the_slopes(layer: str) -> None:
    build, x = {
        "linear": (lambda: nn.Linear(4, 5), randn(6, 4)),
        "sequence": (lambda: nn.Linear(4, 5), randn(6, 3, 4)),
        "convolution": (lambda: nn.Conv2d(2, 3, 2), randn(6, 2, 4, 4)),
    }[layer]
    first = build().double()
    head = nn.Linear(first(x).flatten(1).shape[1], CLASSES).double()
    batch = x, randn(6, CLASSES)
    found = []
    for inplace in (True, False):
        module = nn.Sequential(first, nn.ReLU(inplace=inplace), nn.Flatten(), head)
        found.append(factors(dhf.Objective(module, nn.MSELoss()), whole(batch))[0])
    plain = dhf.Objective(module, nn.MSELoss())
    assert_factors(plain, batch, [([first], True), ([head], True)])
    for (A, G), (true_A, true_G) in zip(*found, strict=True):
        assert relative_error(A, true_A) < 1e-13
        assert relative_error(G, true_G) < 1e-13


class Uncovered(nn.Module):
    """Layers that are not covered, beside some that are."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(2, 4, 3, groups=2, padding=1)
        self.reflecting = nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect")
        self.over_time = nn.Conv1d(2, 2, 3)
        self.norm = nn.LayerNorm(4)
        self.frozen, self.covered = nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.frozen.weight.requires_grad_(False)
        self.never = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.reflecting(torch.tanh(self.grouped(x))).flatten(2)
        h = self.over_time(h).mean(1)
        return self.covered(torch.tanh(self.frozen(self.norm(h[:, :4]))))


def test_which_layers_are_covered() -> None:
    module = Uncovered().double()
    objective, parameters = dhf.Objective(module, nn.MSELoss()), Parameters(module)
    found = layers_of(objective, parameters)
    assert [layer.modules for layer in found] == [(module.covered,), (module.never,)]
    assert [parameters.names[layer.weight] for layer in found] == ["covered.weight", "never.weight"]
    assert [parameters.names[layer.bias] for layer in found if layer.bias] == ["covered.bias", "never.bias"]
    batch = randn(4, 2, 4, 4), randn(4, CLASSES)
    layers = [*found]
    out = [torch.zeros(shape, dtype=torch.float64) for shape in factor_shapes(layers, parameters)]
    add_factors(objective, parameters, layers, 0, *whole(batch), out)
    assert out[-2].tolist() == [1.0, 0.0]  # places
    assert not out[2].any()
    assert not out[3].any()
    true_A, true_G = looped_factors(objective, batch, [module.covered], True)
    assert relative_error(out[0], true_A) < 1e-12
    assert relative_error(out[1], true_G) < 1e-12


def test_layer_whose_output_does_not_reach_the_loss_has_no_slopes() -> None:
    class Aside(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            self[1](x)
            return self[0](x)

    module = Aside(nn.Linear(4, CLASSES), nn.Linear(4, 2)).double()
    x = randn(5, 4)
    found, gradient = factors(dhf.Objective(module, nn.MSELoss()), whole((x, randn(5, CLASSES))))
    a = torch.cat([x, torch.ones(5, 1).double()], 1)
    assert relative_error(found[1][0], a.T @ a / 5) < 1e-12
    assert not found[1][1].any()
    assert not gradient[5 * CLASSES :].any()
    assert gradient[: 5 * CLASSES].any()


# Fisher blocks


def gradient_rows(objective: dhf.Objective, batch: Any) -> Tensor:
    """Every sample's ∇(-log p(ŷ|x)) of its weight with the bias as last column, flattened by rows, shape (N, n)."""
    x, y = batch
    c = sampled_slopes(objective, module_outputs(objective.module, x), y)
    rows = []
    for i in range(len(x)):
        g = torch.autograd.grad(objective.module(x[i : i + 1]), list(objective.module.parameters()), c[i : i + 1])
        rows.append(torch.cat([g[0].flatten(1), g[1][:, None]], 1).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("loss", LABELLED)
@pytest.mark.parametrize("samples", [1, 9])
def test_product_is_the_fisher_block_where_all_inputs_are_alike(loss: str, samples: int) -> None:
    module = nn.Sequential(nn.Linear(4, CLASSES)).double()
    objective = dhf.Objective(module, LOSSES[loss][0])
    batch = randn(1, 4).expand(samples, 4).contiguous(), LOSSES[loss][2](samples)
    g = gradient_rows(objective, batch)
    ((A, G),), _ = factors(objective, whole(batch))
    assert relative_error(torch.kron(G, A), g.T @ g / samples) < 1e-12


def blind(*shape: int) -> nn.Module:
    """A linear layer with zero weights: its outputs, and so their labels, know nothing of its inputs."""
    module = nn.Linear(*shape).double()
    with torch.no_grad():
        module.weight.zero_()
    return module


@pytest.mark.parametrize("loss", LABELLED)
def test_product_tends_to_gauss_newton_where_inputs_and_slopes_are_independent(loss: str) -> None:
    objective = dhf.Objective(blind(2, CLASSES), LOSSES[loss][0])
    batch = randn(20_000, 2), LOSSES[loss][2](20_000)
    ((A, G),), _ = factors(objective, whole(batch))
    a = torch.cat([batch[0], torch.ones(20_000, 1).double()], 1)
    assert relative_error(A, a.T @ a / 20_000) < 1e-12
    H = dense_gauss_newton(objective.module, (batch[0][:1], batch[1][:1]), LOSSES[loss][1])[-CLASSES:, -CLASSES:]
    assert relative_error(G, H) < 0.05


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_product_tends_to_gauss_newton_over_several_targets_per_sample(loss: str) -> None:
    class Steps(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](x).transpose(1, 2)  # classes before time, as torch's cross-entropy has them

    samples, steps = 4000, 5
    module = Steps(blind(2, CLASSES))
    x = randn(samples, steps, 2)
    y = torch.randint(0, CLASSES, (samples, steps)) if loss == "cross_entropy" else randn(samples, CLASSES, steps)
    ((A, G),), _ = factors(dhf.Objective(module, LOSSES[loss][0]), whole((x, y)))
    a = torch.cat([x.reshape(-1, 2), torch.ones(samples * steps, 1).double()], 1)
    assert relative_error(A, a.T @ a / (samples * steps)) < 1e-12
    p = torch.softmax(module[0].bias.detach(), 0)
    H = torch.diag(p) - torch.outer(p, p) if loss == "cross_entropy" else 2 / CLASSES * torch.eye(CLASSES).double()
    assert relative_error(G, H) < 0.05


# losses without labels, micro-batches


def test_loss_without_a_predictive_distribution_gives_its_own_gradients() -> None:
    objective, (x, y) = problem("mlp", "soft_margin")
    found, gradient = factors(objective, whole((x, y)))
    slopes, rows = [], []
    for i in range(7):
        z = objective.module(x[i : i + 1])
        loss = LOSSES["soft_margin"][1](z, y[i : i + 1])
        slopes.append(torch.autograd.grad(loss, z, retain_graph=True)[0][0])
        rows.append(flat(torch.autograd.grad(loss, list(objective.module.parameters()))))
    g = torch.stack(slopes)
    assert relative_error(found[1][1], g.T @ g / 7) < 1e-12
    assert relative_error(gradient, torch.stack(rows).mean(0)) < 1e-12


@pytest.mark.parametrize("loss", ["cross_entropy", "bce", "soft_margin"])
@pytest.mark.parametrize("sizes", [[7], [3, 4], [1, 5, 1]])
def test_micro_batches_add_up(loss: str, sizes: list[int]) -> None:
    objective, (x, y) = problem("mlp", loss)
    firsts = [sum(sizes[:j]) for j in range(len(sizes))]
    parts = [
        MicroBatch((x[first : first + size], y[first : first + size]), size, size / 7, first)
        for first, size in zip(firsts, sizes, strict=True)
    ]
    (found, gradient), (truth, true_gradient) = factors(objective, parts), factors(objective, whole((x, y)))
    for pair, true_pair in zip(found, truth, strict=True):
        for factor, true_factor in zip(pair, true_pair, strict=True):
            assert relative_error(factor, true_factor) < 1e-12
    assert relative_error(gradient, true_gradient) < 1e-12


def test_micro_batches_add_up_where_classes_are_weighted() -> None:
    module, (x, y) = problem("mlp")[0].module, problem("mlp", "cross_entropy")[1]
    weight = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
    objective = dhf.Objective(module, nn.CrossEntropyLoss(weight))
    counts = weight[y]
    parts = [
        MicroBatch((x[s], y[s]), len(x[s]), float(counts[s].sum() / counts.sum()), s.start)
        for s in (slice(0, 2), slice(2, 7))
    ]
    (_, (_, G)), gradient = factors(objective, parts)
    p = torch.softmax(module_outputs(module, x), 1)
    c = counts[:, None] * (p - F.one_hot(y, CLASSES))  # no labels can be sampled: the data's own
    assert relative_error(G, c.T @ c / counts.sum()) < 1e-12
    assert relative_error(gradient[-CLASSES:], c.sum(0) / counts.sum()) < 1e-12


@pytest.mark.parametrize("cut", [0, 2, 6])
def test_micro_batches_add_up_where_samples_are_ignored(cut: int) -> None:
    module, (x, y) = problem("mlp")[0].module, problem("mlp", "cross_entropy", 9)[1]
    y[:5:2] = -100
    objective = dhf.Objective(module, nn.CrossEntropyLoss())
    c = sampled_slopes(objective, module_outputs(module, x), y)
    h = torch.cat([torch.tanh(module[0](x)).detach(), torch.ones(9, 1).double()], 1)
    parts = [
        MicroBatch((x[s], y[s]), len(x[s]), int((y[s] >= 0).sum()) / 6, s.start)
        for s in (slice(0, cut), slice(cut, 9))
        if cut or s.start == s.stop - 9
    ]
    (_, (A, G)), gradient = factors(objective, parts)
    assert relative_error(A, h.T @ h / 9) < 1e-12
    assert relative_error(G, c.T @ c / 6) < 1e-12
    assert relative_error(gradient[-CLASSES:], c.sum(0) / 6) < 1e-12
