"""Deep sigmoid autoencoders of images, from a start that first-order methods dislike: what digits, curves and mnist share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dhf.losses import BinaryCrossEntropy
from dhf.objective import Objective
from dhf.problems.options import require_whole
from dhf.problems.problem import Problem, match_module

__all__ = ["autoencoder_problem", "sigmoid_network", "sparse_initialisation"]

_MEASURED = 10_000
_DRAWN = 20


def autoencoder_problem(
    widths: Sequence[int], images: Tensor, connections: int, *, validation: Tensor | None = None
) -> Problem:
    """A sigmoid autoencoder of square images from the sparse start.

    The loss is binary cross-entropy in nats, summed over pixels and averaged over images. The metric ``squared_error`` is
    the squared distance of image and reconstruction, summed over pixels and averaged over the validation images, or
    over the first 10,000 of ``images`` where there are none; the pictures show the first 20 of the same.

    Args:
        widths: Units of each layer, the first and last one per pixel.
        images: Shape (N, pixels), values in [0, 1].
        connections: Incoming weights per unit that are not zero at the start.
        validation: Held-out images of the same form.

    Raises:
        UsageError: If ``connections`` is not a whole number of at least 1.

    Source: the network family of Hinton & Salakhutdinov (2006), here with a sigmoid code where theirs is linear; initialised
    as in Martens (2010), section 5.
    """
    require_whole(1, connections=connections)
    module = sigmoid_network(widths)
    sparse_initialisation(module, connections)
    measured = (images if validation is None else validation)[:_MEASURED]

    def metrics(module: torch.nn.Module) -> dict[str, float]:
        inputs = match_module(measured, module)
        with torch.no_grad():
            distance = (torch.sigmoid(module(inputs)) - inputs).double().square().sum(1).mean()
        return {"squared_error": float(distance)}

    def pictures(module: torch.nn.Module, folder: Path) -> list[Path]:
        inputs = match_module(measured[:_DRAWN], module)
        with torch.no_grad():
            reconstructions = torch.sigmoid(module(inputs))
        return [_draw(inputs, reconstructions, folder / "reconstructions.png")]

    return Problem(
        Objective(module, BinaryCrossEntropy("sum")),
        (images, images),
        validation=None if validation is None else (validation, validation),
        metrics=metrics,
        pictures=pictures,
    )


def sigmoid_network(widths: Sequence[int]) -> torch.nn.Sequential:
    """Linear layers of these widths with sigmoids between them; the outputs are logits."""
    layers: list[torch.nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [torch.nn.Linear(fan_in, fan_out), torch.nn.Sigmoid()]
    return torch.nn.Sequential(*layers[:-1])


@torch.no_grad()
def sparse_initialisation(module: torch.nn.Module, connections: int) -> None:
    """Martens' start: each unit of a Linear layer has ``connections`` incoming N(0, 1) weights, others and biases zero.

    Source: Martens, "Deep learning via Hessian-free optimization" (2010), section 5.
    """
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.zero_()
            layer.bias.zero_()
            for unit in layer.weight:
                chosen = torch.randperm(len(unit))[:connections]
                unit[chosen] = torch.randn(len(chosen), dtype=unit.dtype)


def _draw(originals: Tensor, reconstructions: Tensor, path: Path) -> Path:
    """Originals above their reconstructions, in two blocks."""
    import matplotlib
    from matplotlib.figure import Figure

    side, columns = math.isqrt(originals.shape[1]), -(-len(originals) // 2)
    figure = Figure(figsize=(max(columns, 3) * 0.8, 4.0), layout="constrained")
    axes = figure.subplots(4, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for i in range(len(originals)):
        block, column = divmod(i, columns)
        for offset, images in enumerate((originals, reconstructions)):
            axis = axes[2 * block + offset, column]
            axis.imshow(images[i].detach().cpu().view(side, side).numpy(), cmap="gray_r", vmin=0, vmax=1)
            if column == 0:
                axis.set_ylabel(("original", "rebuilt")[offset])
    path = path.with_suffix(f".{matplotlib.rcParams['savefig.format']}")
    figure.savefig(path, dpi=120)
    return path
