"""The operators by the matrix they multiply with: Hessian, GaussNewton, Fisher; and the gradient alone."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from dhf.comm import Communicator
from dhf.coordinator import Coordinator, capture
from dhf.curvature import FisherGraph, GaussNewtonGraph, GradientGraph, HessianGraph
from dhf.curvature.traced import graph_builder
from dhf.evaluation import evaluate, micro_batch_seeds
from dhf.objective import Objective
from dhf.operator.global_operator import GlobalOperator

__all__ = ["Fisher", "GaussNewton", "Hessian", "loss_and_gradient", "loss_at"]


class Hessian(GlobalOperator):
    """The Hessian of the objective. Symmetric, indefinite in general.

    Args:
        objective: What is differentiated.
        batches: This rank's micro-batches.
        comm: How ranks talk; one process by default.
        products: ``"retained"``: autograd's graph, differentiated once more for each product; ``"traced"``: its operations,
            recorded once for each shape of micro-batch and replayed; ``"compiled"``: the same, compiled; ``"auto"``: traced
            for modules with convolutions or recurrent layers (on a GPU for Gauss-Newton alone), else retained. What cannot be compiled is traced, and
            what cannot be recorded retained, with a warning.
        **options: ``parameters``, ``seed``, ``coordinator``, ``move_buffers``, ``debug_nonfinite``, ``retain`` as in
            :class:`GlobalOperator`.

    Example:
        >>> import torch
        >>> x, y = torch.eye(2, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
        >>> objective = Objective(torch.nn.Linear(2, 1, bias=False).double(), torch.nn.MSELoss())
        >>> with Hessian(objective, [(x, y)]) as A:  # 2/N xᵀx = I
        ...     A @ torch.tensor([3.0, 4.0], dtype=torch.float64)
        tensor([3., 4.], dtype=torch.float64)
    """

    def __init__(
        self,
        objective: Objective,
        batches: Iterable[Any],
        *,
        comm: Communicator | None = None,
        products: str = "retained",
        **options: Any,
    ) -> None:
        super().__init__(objective, batches, comm=comm, build=graph_builder(HessianGraph, products), **options)


class GaussNewton(GlobalOperator):
    """The generalised Gauss-Newton matrix ``1/N Σ Jᵀ ∇²ℓ J``. Positive semi-definite where the loss is convex in the outputs.

    Arguments as :class:`Hessian`.
    """

    def __init__(
        self,
        objective: Objective,
        batches: Iterable[Any],
        *,
        comm: Communicator | None = None,
        products: str = "retained",
        **options: Any,
    ) -> None:
        super().__init__(objective, batches, comm=comm, build=graph_builder(GaussNewtonGraph, products), **options)


class Fisher(GlobalOperator):
    """The Fisher matrix, by labels sampled from the model's predictive distribution. Positive semi-definite.

    Args:
        objective: One with MSE, cross-entropy, BCE-with-logits or LeastSquares loss.
        batches: This rank's micro-batches. Ranks and micro-batches in the data's order draw the same labels however split.
        comm: How ranks talk; one process by default.
        samples: Labels drawn per sample.
        seed: Names the labels; the same on all ranks.
        products: As in :class:`Hessian`.
        **options: ``parameters``, ``coordinator``, ``move_buffers``, ``debug_nonfinite``, ``retain`` as in
            :class:`GlobalOperator`.
    """

    def __init__(
        self,
        objective: Objective,
        batches: Iterable[Any],
        *,
        comm: Communicator | None = None,
        samples: int = 1,
        seed: int = 0,
        products: str = "retained",
        **options: Any,
    ) -> None:
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        build = functools.partial(
            FisherGraph, samples=samples, seed=seed, gauss_newton=graph_builder(GaussNewtonGraph, products)
        )
        super().__init__(objective, batches, comm=comm, build=build, seed=seed, **options)


def loss_and_gradient(
    objective: Objective, batches: Iterable[Any], *, comm: Communicator | None = None, **options: Any
) -> tuple[float, Tensor]:
    """The global loss and gradient (shape (n,)), with no graph kept; arguments as :class:`GlobalOperator`."""
    with GlobalOperator(objective, batches, comm=comm, build=GradientGraph, **options) as gradient:
        return gradient.loss, gradient.gradient


def loss_at(
    theta: Tensor, objective: Objective, batches: Sequence[Any], coordinator: Coordinator, *, seed: int = 0
) -> float:
    """The global loss at the module's parameters, by forward passes alone; the same on every rank.

    Args:
        theta: The parameters as a flat vector, shape (n,), for weight decay.
        objective: What is evaluated.
        batches: This rank's micro-batches.
        coordinator: How ranks agree.
        seed: Fixes dropout and other randomness; the same on all ranks.
    """
    rank, decay = coordinator.comm.rank, 0.0
    seeds = micro_batch_seeds(seed, rank, len(batches))
    with coordinator.phases("trial"):
        sums, failure = capture(lambda: evaluate(objective, theta.device, batches, seeds))
    if rank == 0 and objective.weight_decay:  # rank 0's alone, so that every rank holds the same bits
        decay = 0.5 * objective.weight_decay * float(theta.double().square().sum())
    total, count, decay = coordinator.reduce([*(sums or (0.0, 0.0)), decay], failure=failure)
    return total / count + decay
