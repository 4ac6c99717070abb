"""FisherGraph: products with the Fisher matrix of one micro-batch, labels sampled from the model itself.

    F v = 1/N Σ_i Jᵢᵀ cᵢ cᵢᵀ Jᵢ v,    cᵢ = ∂/∂z (-log p(ŷᵢ | zᵢ)),  ŷᵢ ~ p(· | zᵢ)

A sample's label is drawn from a counter-based stream at the sample's place among all data, so that however the data
are split over ranks and micro-batches, in their order, the same labels are drawn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dhf.curvature.gauss_newton import GaussNewton, GaussNewtonGraph, PushedGraph
from dhf.errors import UsageError
from dhf.objective import Objective
from dhf.parameters import Parameters

__all__ = ["FisherGraph", "uniforms"]


class FisherGraph:
    """A Gauss-Newton graph whose output Hessian is that of sampled labels.

    Args:
        objective: One whose loss has a predictive distribution: MSE, cross-entropy, BCE-with-logits or LeastSquares.
        parameters: What is differentiated.
        batch: One micro-batch.
        samples: Labels drawn per sample.
        seed: Names the stream of random numbers.
        gauss_newton: Makes the graph of outputs and Jacobian; may have an ``along`` as GaussNewtonGraph has.

    Raises:
        UsageError: If the loss has no predictive distribution.
    """

    def __init__(
        self,
        objective: Objective,
        parameters: Parameters,
        batch: Any,
        *,
        samples: int = 1,
        seed: int = 0,
        gauss_newton: Callable[[Objective, Parameters, Any], GaussNewton] = GaussNewtonGraph,
    ) -> None:
        known = objective.known_loss()
        if known is None:
            raise UsageError(
                "the Fisher matrix needs a loss with a predictive distribution (MSELoss, CrossEntropyLoss, BCEWithLogitsLoss "
                "or LeastSquares), found another; use the Gauss-Newton matrix"
            )
        self._graph = gauss_newton(objective, parameters, batch)
        self.rows, self.width, self.gradient = self._graph.rows, self._graph.width, self._graph.gradient
        self._loss = known
        self._targets: Any = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
        self._count = objective.count(batch)
        self._samples, self._seed = samples, seed

    @property
    def loss(self) -> Tensor:
        """Mean loss over the micro-batch with its own labels, 0-dim."""
        return self._graph.loss

    @staticmethod
    def along(
        objective: Objective, parameters: Parameters, batch: Any, v: Sequence[Tensor], **options: Any
    ) -> FisherGraph:
        """A graph for products with v alone, built in one pass."""
        along = functools.partial(PushedGraph, v=v)
        return FisherGraph(objective, parameters, batch, **{**options, "gauss_newton": along})

    def begin(self, first_row: int) -> None:
        """Draw the labels of rows ``first_row`` and on of all data."""
        z = self._graph.outputs.detach()
        draws = self._loss.draws(z)
        if draws is None:
            raise UsageError(
                "this loss has no predictive distribution to sample labels from; use the Gauss-Newton matrix"
            )
        numbers = uniforms(self._seed, first_row, self.rows, draws * self._samples).to(z.device)
        cs = [self._loss.sampled_gradients(z, self._targets, u) for u in numbers.chunk(self._samples, dim=1)]
        scale = 1.0 / (self._samples * self._count)
        loss = self._loss
        self._graph.output_hessian = lambda u: torch.stack([c * loss.inner(c, u) for c in cs]).sum(0) * scale

    def product(self, v: Sequence[Tensor]) -> Sequence[Tensor]:
        """``F v``, one tensor per parameter, from one tensor per parameter."""
        return self._graph.product(v)

    def push(self, v: Sequence[Tensor]) -> Tensor:
        """``J v``, of the outputs' shape."""
        return self._graph.push(v)


def uniforms(seed: int, first_row: int, rows: int, draws: int) -> Tensor:
    """Float64 numbers in (0, 1), shape (rows, draws), that depend only on the seed and each row's place."""
    blocks = -(-draws // 4)  # Philox makes four numbers per counter
    stream = np.random.Philox(key=seed).advance(first_row * blocks)
    numbers = np.random.Generator(stream).random((rows, 4 * blocks))[:, :draws] + 2.0**-54
    return torch.from_numpy(np.ascontiguousarray(numbers))
