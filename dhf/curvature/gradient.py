"""GradientGraph: the loss and gradient of one micro-batch, with nothing kept for products."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dhf.errors import UsageError
from dhf.objective import Objective
from dhf.parameters import Parameters

__all__ = ["GradientGraph", "differentiable_once", "require_second_derivatives", "rows_and_width", "scalar_loss"]

# for each module the kinds of objective that have been looked at
_examined: weakref.WeakKeyDictionary[torch.nn.Module, set[type]] = weakref.WeakKeyDictionary()


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


def require_second_derivatives(objective: Objective, derivatives: Sequence[Tensor]) -> None:
    """Refuse first derivatives that autograd would differentiate in part; looked at once per module and kind of objective.

    Raises:
        UsageError: If a function is marked once_differentiable.
    """
    known = _examined.setdefault(objective.module, set())
    if type(objective) not in known:
        if differentiable_once(derivatives):
            raise UsageError(
                "a torch.autograd.Function of the objective is marked once_differentiable, so that its second derivatives are "
                "missing; write its backward of differentiable operations and take the mark off"
            )
        known.add(type(objective))


def differentiable_once(derivatives: Sequence[Tensor]) -> bool:
    """Whether a function that is marked once_differentiable is in the graph of these derivatives.

    Its node raises only where it is on the only way; elsewhere autograd passes over it, and a second derivative lacks a part.
    """
    seen: set[Any] = set()
    left = [g.grad_fn for g in derivatives]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            return True
        seen.add(node)
        left += [parent for parent, _ in node.next_functions]
    return False


def rows_and_width(outputs: Tensor) -> tuple[int, int]:
    """How many samples outputs of shape (N, ...) belong to, and how many numbers each has."""
    rows = outputs.shape[0] if outputs.dim() else 0
    return rows, outputs.numel() // rows if rows else 0
