"""Kronecker factors of one micro-batch: what K-FAC sums over samples, with labels sampled from the model itself.

    layer z = W a:    Fisher block ≈ A ⊗ G,  A = E[a aᵀ],  G = E[Σ_t g_t g_tᵀ],  g = ∂(-log p(ŷ|·))/∂z,  ŷ ~ p

a has a 1 appended where the layer has a bias; t runs over the places a layer is used at within one sample (time steps, pixels
of a convolution, repeated calls), over which A is averaged and G is added up. E of G divides by what the samples count in the
mean loss: by their number, or, for a cross-entropy of several targets per sample, by that of the targets.

Source: Martens & Grosse (2015); convolutions: Grosse & Martens (2016); several places: "KFAC-expand", Eschenhagen et al. (2023).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dhf.curvature.fisher import uniforms
from dhf.curvature.shard import MicroBatch
from dhf.objective import Objective
from dhf.parameters import Parameters

__all__ = ["Layer", "add_factors", "factor_shapes", "layers_of"]


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """A layer that K-FAC covers.

    Attributes:
        modules: The modules that use its weight; more than one where weights are tied.
        weight: Index of its weight among the parameters.
        bias: Index of its bias, or None.
        sizes: Rows of A and of G.
    """

    modules: tuple[nn.Module, ...]
    weight: int
    bias: int | None
    sizes: tuple[int, int]


def layers_of(objective: Objective, parameters: Parameters) -> list[Layer]:
    """The Linear and ungrouped Conv2d layers whose weight is trained, in the parameters' order."""
    place = {id(p): i for i, p in enumerate(parameters.tensors)}
    users: dict[int, list[nn.Module]] = {}
    for module in objective.module.modules():
        covered = isinstance(module, nn.Linear) or (
            isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"
        )
        if covered and id(module.weight) in place and parameters.tensors[place[id(module.weight)]].numel():
            users.setdefault(place[id(module.weight)], []).append(module)
    found: list[Layer] = []
    for weight, modules in sorted(users.items()):
        biases = {None if m.bias is None else place.get(id(m.bias)) for m in modules}
        bias = biases.pop() if len(biases) == 1 else None
        if any(bias == layer.bias for layer in found):  # a bias of two layers stands in the first one's block
            bias = None
        outputs, inputs = parameters.tensors[weight].flatten(1).shape
        found.append(Layer(tuple(modules), weight, bias, (inputs + (bias is not None), outputs)))
    return found


def factor_shapes(layers: Sequence[Layer], parameters: Parameters) -> list[tuple[int, ...]]:
    """The shapes of what :func:`add_factors` adds up: each layer's A and G, how often it was used, and one gradient."""
    squares = [(size, size) for layer in layers for size in layer.sizes]
    return [*squares, (len(layers),), (parameters.numel,)]


def add_factors(
    objective: Objective,
    parameters: Parameters,
    layers: Sequence[Layer],
    seed: int,
    part: MicroBatch,
    out: Sequence[Tensor],
) -> None:
    """Add a micro-batch's factors, weighted, to ``out`` of :func:`factor_shapes`.

    The last two are the places at which each layer is used, per what the samples count, and the mean gradient for the sampled
    labels. A loss without a predictive distribution gives the factors of its own gradients, the empirical Fisher matrix's.
    Samples that count nothing have no part in G, and one in A where others of their micro-batch count.
    """
    with torch.enable_grad(), _recorded(layers) as uses:
        z = objective.outputs(part.batch)
    tensors = [use.output for used in uses for use in used]
    count = objective.count(part.batch)
    with torch.enable_grad():
        slopes = _sampled_slopes(objective, z.detach(), part, seed, count)
    (*grads,) = torch.autograd.grad(z, [*tensors, *parameters.tensors], slopes, materialize_grads=True)
    share = part.weight / count  # of one sample, or target
    out[-1].add_(parameters.flatten(grads[len(tensors) :]), alpha=share)
    slope = iter(grads)
    for i, (layer, used) in enumerate(zip(layers, uses, strict=True)):
        for use in used:
            inputs, g = _rows(use.module, use.input, layer.bias is not None), _gradient_rows(use.module, next(slope))
            # A is divided by the places once their number over all uses is known
            out[2 * i].addmm_(inputs.T, inputs, alpha=share)
            out[2 * i + 1].addmm_(g.T, g, alpha=share)
            out[-2][i] += len(inputs) * share


def _sampled_slopes(objective: Objective, z: Tensor, part: MicroBatch, seed: int, count: float) -> Tensor:
    """``c`` of the outputs' shape: per-sample gradients in the outputs for labels drawn at the samples' places."""
    known = objective.known_loss()
    draws = None if known is None else known.draws(z)
    if known is None or draws is None:
        at = z.requires_grad_(True)
        return torch.autograd.grad(objective.loss(at, part.batch), at)[0] * count
    targets: Any = part.batch[1] if isinstance(part.batch, (tuple, list)) and len(part.batch) > 1 else None
    numbers = uniforms(seed, part.first_row, z.shape[0], draws).to(z.device)
    return known.sampled_gradients(z, targets, numbers)


@dataclasses.dataclass(frozen=True, slots=True)
class _Use:
    """One call of a layer."""

    module: nn.Module
    input: Tensor
    output: Tensor


@contextlib.contextmanager
def _recorded(layers: Sequence[Layer]) -> Iterator[list[list[_Use]]]:
    """Each layer's uses in the forward passes made inside."""
    uses: list[list[_Use]] = [[] for _ in layers]
    with contextlib.ExitStack() as stack:
        for layer, used in zip(layers, uses, strict=True):

            def note(module: nn.Module, a: Any, named: Any, z: Tensor, used: list[_Use] = used) -> Tensor:
                if z.requires_grad:
                    used.append(_Use(module, (a[0] if a else named["input"]).detach(), z))
                return z.clone()  # an activation in place would make the tensor noted its own output

            for module in layer.modules:
                stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        yield uses


def _rows(module: nn.Module, a: Tensor, bias: bool) -> Tensor:
    """A layer's inputs as rows, one per sample and place, with a 1 appended for the bias."""
    if isinstance(module, nn.Conv2d):
        padding = module.padding
        if isinstance(padding, str):
            edges = [0] * 4 if padding == "valid" else _same_padding(module)
            a, padding = F.pad(a, edges), (0, 0)
        a = F.unfold(a, module.kernel_size, module.dilation, padding, module.stride).transpose(1, 2)
    flat = a.reshape(-1, a.shape[-1])
    return torch.cat([flat, flat.new_ones(len(flat), 1)], 1) if bias else flat


def _same_padding(module: nn.Conv2d) -> list[int]:
    """(left, right, top, bottom) of padding='same'."""
    totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]


def _gradient_rows(module: nn.Module, g: Tensor) -> Tensor:
    if isinstance(module, nn.Conv2d):
        g = g.flatten(2).transpose(1, 2)
    return g.reshape(-1, g.shape[-1])
