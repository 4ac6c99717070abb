"""HessianGraph: products with the Hessian of one micro-batch's loss.

    H v = ∂/∂θ (∇f(θ) · v)

The gradient graph ∇f(θ) is built once and kept; each product differentiates it once more (Pearlmutter, 1994).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from dhf.curvature.gradient import require_second_derivatives, rows_and_width, scalar_loss
from dhf.objective import Objective
from dhf.parameters import Parameters

__all__ = ["HessianGraph"]


class HessianGraph:
    """The retained gradient graph of one micro-batch."""

    def __init__(self, objective: Objective, parameters: Parameters, batch: Any) -> None:
        outputs = objective.outputs(batch)
        objective.check(outputs, batch)
        loss = scalar_loss(objective, outputs, batch)
        gradient = torch.autograd.grad(loss, parameters.tensors, create_graph=True, materialize_grads=True)
        require_second_derivatives(objective, gradient)
        self.rows, self.width = rows_and_width(outputs)
        self.loss = loss.detach()
        self.gradient: Sequence[Tensor] = [g.detach() for g in gradient]
        self._tensors = parameters.tensors
        # the gradient of a parameter that enters linearly is constant, and has no graph
        self._kept = [i for i, g in enumerate(gradient) if g.requires_grad]
        # edges, since the values of a gradient would be one flat vector per micro-batch
        self._graph = [get_gradient_edge(gradient[i]) for i in self._kept]

    def begin(self, first_row: int) -> None:
        """The Hessian does not depend on where the micro-batch stands among all data."""

    def product(self, v: Sequence[Tensor]) -> Sequence[Tensor]:
        """``H v``, one tensor per parameter, from one tensor per parameter."""
        if not self._graph:
            return [torch.zeros_like(p) for p in self._tensors]
        return torch.autograd.grad(
            self._graph, self._tensors, [v[i] for i in self._kept], retain_graph=True, materialize_grads=True
        )
