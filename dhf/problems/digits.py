"""Handwritten digits: a deep autoencoder and a classifier on scikit-learn's 1,797 images of 8x8 pixels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dhf.losses import CrossEntropy
from dhf.objective import Objective
from dhf.problems.autoencoder import autoencoder_problem
from dhf.problems.problem import Problem, match_module

__all__ = ["autoencoder", "classifier"]


def autoencoder(connections: int = 15) -> Problem:
    """A deep autoencoder, 64-100-50-25-6-25-50-100-64 with sigmoid hidden units, from a start that first-order methods dislike.

    The loss is binary cross-entropy in nats, summed over pixels and averaged over images; the metric ``squared_error`` is
    the squared distance of image and reconstruction, summed over pixels and averaged over images.

    Args:
        connections: Incoming weights per unit that are not zero at the start.

    Source: the network family of Hinton & Salakhutdinov (2006), initialised as in Martens (2010), section 5.
    """
    images, _ = _load()
    return autoencoder_problem((64, 100, 50, 25, 6, 25, 50, 100, 64), images, connections)


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
            guesses = module(match_module(images[held_out], module)).argmax(1).cpu()
        return {"accuracy": float((guesses == labels[held_out]).double().mean())}

    return Problem(
        Objective(module, CrossEntropy()),
        (images[train], labels[train]),
        validation=(images[held_out], labels[held_out]),
        metrics=metrics,
    )


def _load() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images / 16.0), torch.from_numpy(labels).long()
