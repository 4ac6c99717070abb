"""Handwritten digits: a deep autoencoder and a classifier on scikit-learn's 1,797 images of 8x8 pixels."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dhf.errors import UsageError
from dhf.losses import BinaryCrossEntropy, CrossEntropy
from dhf.objective import Objective
from dhf.problems.problem import Problem

__all__ = ["autoencoder", "classifier", "sparse_initialisation"]

_WIDTHS = (64, 100, 50, 25, 6, 25, 50, 100, 64)


def autoencoder(connections: int = 15) -> Problem:
    """A deep autoencoder, 64-100-50-25-6-25-50-100-64 with sigmoid hidden units, from a start that first-order methods dislike.

    The loss is binary cross-entropy in nats, summed over pixels and averaged over images; the metric ``squared_error`` is
    the squared distance of image and reconstruction, summed over pixels and averaged over images.

    Args:
        connections: Incoming weights per unit that are not zero at the start.

    Source: the network family of Hinton & Salakhutdinov (2006), initialised as in Martens (2010), section 5.
    """
    images, _ = _load()
    module = _sigmoid_network(_WIDTHS)
    sparse_initialisation(module, connections)
    objective = Objective(module, BinaryCrossEntropy("sum"))

    def metrics(module: torch.nn.Module) -> dict[str, float]:
        inputs = _like(module, images)
        with torch.no_grad():
            distance = (torch.sigmoid(module(inputs)) - inputs).double().square().sum(1).mean()
        return {"squared_error": float(distance)}

    def pictures(module: torch.nn.Module, folder: Path) -> list[Path]:
        inputs = _like(module, images[:20])
        with torch.no_grad():
            reconstructions = torch.sigmoid(module(inputs))
        return [_draw(inputs, reconstructions, folder / "reconstructions.png")]

    return Problem(objective, (images, images), metrics=metrics, pictures=pictures)


def classifier(seed: int = 0) -> Problem:
    """A 64-64-32-10 tanh network with cross-entropy; 1,437 training images and 360 held out. Metric: ``accuracy`` on those.

    Args:
        seed: Names the permutation that splits the data.
    """
    images, labels = _load()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(images)))
    train, held_out = order[:1437], order[1437:]
    module = torch.nn.Sequential(
        torch.nn.Linear(64, 64),
        torch.nn.Tanh(),
        torch.nn.Linear(64, 32),
        torch.nn.Tanh(),
        torch.nn.Linear(32, 10),
    )

    def metrics(module: torch.nn.Module) -> dict[str, float]:
        with torch.no_grad():
            guesses = module(_like(module, images[held_out])).argmax(1).cpu()
        return {"accuracy": float((guesses == labels[held_out]).double().mean())}

    return Problem(
        Objective(module, CrossEntropy()),
        (images[train], labels[train]),
        validation=(images[held_out], labels[held_out]),
        metrics=metrics,
    )


@torch.no_grad()
def sparse_initialisation(module: torch.nn.Module, connections: int) -> None:
    """Martens' start: each unit of a Linear layer has ``connections`` incoming N(0, 1) weights, others and biases zero."""
    if connections < 1:
        raise UsageError(f"connections must be at least 1, got {connections}")
    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.zero_()
            layer.bias.zero_()
            for unit in layer.weight:
                chosen = torch.randperm(len(unit))[:connections]
                unit[chosen] = torch.randn(len(chosen), dtype=unit.dtype)


def _sigmoid_network(widths: tuple[int, ...]) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [torch.nn.Linear(fan_in, fan_out), torch.nn.Sigmoid()]
    return torch.nn.Sequential(*layers[:-1])


def _load() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images / 16.0), torch.from_numpy(labels).long()


def _like(module: torch.nn.Module, x: Tensor) -> Tensor:
    first = next(module.parameters())
    return x.to(first.device, first.dtype)


def _draw(originals: Tensor, reconstructions: Tensor, path: Path) -> Path:
    """Originals above their reconstructions, in two blocks of ten."""
    from matplotlib.figure import Figure

    half = len(originals) // 2
    figure = Figure(figsize=(half * 0.8, 4.0), layout="constrained")
    axes = figure.subplots(4, half)
    for i in range(2 * half):
        block, column = divmod(i, half)
        for offset, images in enumerate((originals, reconstructions)):
            axis = axes[2 * block + offset, column]
            axis.imshow(images[i].detach().cpu().view(8, 8).numpy(), cmap="gray_r", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            if column == 0:
                axis.set_ylabel(("original", "rebuilt")[offset])
    figure.savefig(path, dpi=120)
    return path
