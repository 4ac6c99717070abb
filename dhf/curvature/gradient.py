"""GradientGraph: the loss and gradient of one micro-batch, with nothing kept for products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dhf.errors import UsageError
from dhf.objective import Objective
from dhf.parameters import Parameters

__all__ = ["GradientGraph", "rows_and_width", "scalar_loss"]


class GradientGraph:
    """Loss and gradient alone; a product is refused."""

    def __init__(self, objective: Objective, parameters: Parameters, batch: Any) -> None:
        outputs = objective.outputs(batch)
        objective.check(outputs, batch)
        loss = scalar_loss(objective, outputs, batch)
        self.rows, self.width = rows_and_width(outputs)
        self.gradient: Sequence[Tensor] = torch.autograd.grad(loss, parameters.tensors, materialize_grads=True)
        self.loss = loss.detach()

    def begin(self, first_row: int) -> None:
        """Nothing depends on where the micro-batch stands among all data."""

    def product(self, v: Sequence[Tensor]) -> Sequence[Tensor]:
        """There is no curvature here."""
        raise TypeError("a gradient has no product; build a Hessian, Gauss-Newton or Fisher operator")


def scalar_loss(objective: Objective, outputs: Tensor, batch: Any) -> Tensor:
    """The mean loss, checked to be one number that depends on what is differentiated."""
    loss = objective.loss(outputs, batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise UsageError(
            f"the loss must be one number, the mean over the batch's samples, but it has {found}; use loss.mean()"
        )
    if not loss.requires_grad:
        raise UsageError(
            "the loss does not depend on any trainable parameter; check for detach(), .item() or no_grad()"
        )
    return loss.reshape(())


def rows_and_width(outputs: Tensor) -> tuple[int, int]:
    """How many samples outputs of shape (N, ...) belong to, and how many numbers each has."""
    rows = outputs.shape[0] if outputs.dim() else 0
    return rows, outputs.numel() // rows if rows else 0
