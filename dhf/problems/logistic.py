"""Ill-conditioned logistic regression: convex, its gradient known in closed form, and no diagonal scaling mends it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dhf.errors import UsageError
from dhf.losses import BinaryCrossEntropy
from dhf.objective import Objective
from dhf.problems.options import require_finite, require_whole
from dhf.problems.problem import Problem

__all__ = ["logistic"]

_MARGIN = 2.0


def logistic(
    samples: int = 20_000, features: int = 300, condition: float = 1e6, weight_decay: float = 1e-8, seed: int = 0
) -> Problem:
    """Binary logistic regression without intercept from zero, ``f(θ) = 1/N Σ log(1 + exp(-ỹᵢ xᵢ·θ)) + ½ wd ‖θ‖²``, ỹ = ±1.

    The features are ``X = √N U Λ^½ Qᵀ``: U has orthonormal columns, Q is a random rotation and Λ falls from 1 to
    ``1/condition`` in equal ratios. So ``XᵀX/N = QΛQᵀ`` exactly, and the Hessian at zero is a quarter of it plus wd. Labels are
    drawn from a logistic model whose margins ``xᵢ·θ`` have standard deviation 2 and owe as much to every eigenvector of Λ, so
    that the minimiser is far from zero along the flat ones; about a fifth of the labels contradict the sign of their
    margin, and the classes cannot be separated by a plane. The metrics are ``gradient_norm_after``, that of f over all
    samples after a step, in closed form and float64, and the ``accuracy`` on them.

    Args:
        samples: N; at least five per feature, below which the classes may be separable.
        features: Columns of X.
        condition: Of ``XᵀX/N``. Dimensionless.
        weight_decay: wd. Against the Hessian's least eigenvalue at zero, ``1 / (4 condition)``, the default is 4% at the
            default condition, which thereby counts as 9.6e5. The metric follows ``--weight-decay`` too.
        seed: Names the data.

    Raises:
        UsageError: If an option is out of range.
    """
    require_whole(0, seed=seed)
    require_whole(2, features=features)
    require_whole(1, samples=samples)
    require_finite(1.0, condition=condition)
    require_finite(0.0, weight_decay=weight_decay)
    if samples < 5 * features:
        raise UsageError(
            f"{samples} samples of {features} features may be separable, and have no minimiser then; "
            f"use --options.samples {5 * features} or more, or fewer features"
        )
    x, y = _draw(samples, features, condition, np.random.default_rng(seed))
    module = torch.nn.Linear(features, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    objective = Objective(module, BinaryCrossEntropy(), weight_decay=weight_decay)

    def metrics(module: torch.nn.Module) -> dict[str, float]:
        theta = next(module.parameters()).detach().cpu().double().view(-1)
        margins = x @ theta
        gradient = x.T @ (torch.sigmoid(margins) - y) / samples + objective.weight_decay * theta
        return {
            "gradient_norm_after": float(torch.linalg.vector_norm(gradient)),
            "accuracy": float(((margins > 0) == (y > 0.5)).double().mean()),
        }

    return Problem(objective, (x, y.view(-1, 1)), metrics=metrics, dtype="float64")


def _draw(samples: int, features: int, condition: float, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """X of shape (samples, features) and labels 0 or 1 of shape (samples,), float64."""
    gaussian, square = random.standard_normal((samples, features)), random.standard_normal((features, features))
    signs, uniforms = random.choice([-1.0, 1.0], features), random.random(samples)
    with _one_thread():
        orthonormal, rotation = (torch.linalg.qr(torch.from_numpy(a)).Q for a in (gaussian, square))
        scales = torch.from_numpy(np.geomspace(1.0, condition**-0.5, features))
        x = (math.sqrt(samples) * scales * orthonormal) @ rotation.T
        margins = orthonormal @ torch.from_numpy(signs) * (_MARGIN * math.sqrt(samples / features))
    return x, (torch.from_numpy(uniforms) < torch.sigmoid(margins)).double()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep the order of sums, and with it the last bits of the data, from following the number of threads of a rank."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
