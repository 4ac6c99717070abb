"""GaussNewtonGraph: products with the generalised Gauss-Newton matrix of one micro-batch.

    G v = Jᵀ ∇²ℓ(z) J v,    z = outputs(θ),  J = ∂z/∂θ

Two graphs are kept: z, and Jᵀu for a cotangent u. Jᵀu is linear in u, so differentiating ``(Jᵀu)·v`` by u gives J v
whatever u is (Townsend's trick); with u = ∇ℓ(z) its value is the gradient, which then costs nothing more.
∇²ℓ(z) is a closed form for the losses dhf knows, autograd on the loss graph otherwise (Schraudolph, 2002).

For one product alone, J v comes with z in one forward pass, and neither Jᵀu nor the gradient is needed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from dhf.curvature.forward_mode import outputs_along
from dhf.curvature.gradient import rows_and_width, scalar_loss
from dhf.errors import UsageError
from dhf.losses import OutputHessian
from dhf.objective import Objective
from dhf.parameters import Parameters

__all__ = ["GaussNewtonGraph", "PushedGraph"]


class GaussNewtonGraph:
    """The retained graphs of outputs and vector-Jacobian product of one micro-batch.

    Attributes:
        outputs: z, detached, shape (N, ...).
        slope: ∇ℓ(z) of the mean loss, of the same shape.
        output_hessian: The product with the Hessian of the mean loss in z; the Fisher matrix puts its own here.
    """

    def __init__(self, objective: Objective, parameters: Parameters, batch: Any) -> None:
        z = objective.outputs(batch)
        self.loss, self.slope, self.output_hessian = _loss_at(objective, parameters, z, batch)
        self.outputs = z.detach()
        self.rows, self.width = rows_and_width(z)
        self._z, self._tensors = z, parameters.tensors
        self._u = self.slope.clone().requires_grad_(True)
        gradient = torch.autograd.grad(z, self._tensors, self._u, create_graph=True, materialize_grads=True)
        self.gradient: Sequence[Tensor] = [g.detach() for g in gradient]
        # parameters the outputs do not depend on have no graph
        self._kept = [i for i, g in enumerate(gradient) if g.requires_grad]
        # edges, since the values of a gradient would be one flat vector per micro-batch
        self._graph = [get_gradient_edge(gradient[i]) for i in self._kept]

    @staticmethod
    def along(objective: Objective, parameters: Parameters, batch: Any, v: Sequence[Tensor]) -> PushedGraph:
        """A graph for products with v alone, built in one pass."""
        return PushedGraph(objective, parameters, batch, v)

    def begin(self, first_row: int) -> None:
        """The Gauss-Newton matrix does not depend on where the micro-batch stands among all data."""

    def product(self, v: Sequence[Tensor]) -> Sequence[Tensor]:
        """``G v``, one tensor per parameter, from one tensor per parameter."""
        return self.pull(self.output_hessian(self.push(v)))

    def push(self, v: Sequence[Tensor]) -> Tensor:
        """``J v``, of the outputs' shape."""
        return torch.autograd.grad(self._graph, self._u, [v[i] for i in self._kept], retain_graph=True)[0]

    def pull(self, u: Tensor) -> Sequence[Tensor]:
        """``Jᵀ u``, one tensor per parameter, from a tensor of the outputs' shape."""
        return torch.autograd.grad(self._z, self._tensors, u, retain_graph=True, materialize_grads=True)


class PushedGraph:
    """The graph of outputs alone, with ``J v`` for one v; attributes and methods as :class:`GaussNewtonGraph`.

    Raises:
        NotImplementedError, RuntimeError: Where something in the module has no forward derivative.
    """

    def __init__(self, objective: Objective, parameters: Parameters, batch: Any, v: Sequence[Tensor]) -> None:
        self._z, self._Jv = outputs_along(objective, parameters, batch, v)
        self.outputs = self._z.detach()
        self.rows, self.width = rows_and_width(self.outputs)
        self.gradient: Sequence[Tensor] = ()
        self._objective, self._parameters, self._batch = objective, parameters, batch

    @functools.cached_property
    def loss(self) -> Tensor:
        """See :class:`Graph`; taken when it is asked for, as the others are."""
        with torch.no_grad():
            return self._objective.loss(self.outputs, self._batch)

    @functools.cached_property
    def slope(self) -> Tensor:
        """See :class:`GaussNewtonGraph`."""
        return _loss_at(self._objective, self._parameters, self._z, self._batch)[1]

    @functools.cached_property
    def output_hessian(self) -> OutputHessian:
        """See :class:`GaussNewtonGraph`."""
        known = self._objective.output_hessian(self.outputs, self._batch)
        return known or _loss_at(self._objective, self._parameters, self._z, self._batch)[2]

    def begin(self, first_row: int) -> None:
        """See :class:`GaussNewtonGraph`."""

    def product(self, v: Sequence[Tensor]) -> Sequence[Tensor]:
        """``G v`` for the v that the graph was built along."""
        return self.pull(self.output_hessian(self.push(v)))

    def push(self, v: Sequence[Tensor]) -> Tensor:
        """``J v`` for the v that the graph was built along."""
        return self._Jv

    def pull(self, u: Tensor) -> Sequence[Tensor]:
        """``Jᵀ u``, one tensor per parameter, from a tensor of the outputs' shape."""
        return torch.autograd.grad(self._z, self._parameters.tensors, u, retain_graph=True, materialize_grads=True)


def _loss_at(
    objective: Objective, parameters: Parameters, z: Tensor, batch: Any
) -> tuple[Tensor, Tensor, OutputHessian]:
    """The mean loss at outputs z, ∇ℓ(z), and the product with ∇²ℓ(z)."""
    objective.check(z, batch)
    if not z.requires_grad:
        raise UsageError("the outputs do not depend on any trainable parameter; check for detach() or no_grad()")
    with torch.enable_grad():
        at = z.detach().requires_grad_(True)
        loss = scalar_loss(objective, at, batch)
        slope = _loss_slope(loss, at, parameters)
    known = objective.output_hessian(z.detach(), batch)
    return loss.detach(), slope.detach(), known if known is not None else _autograd_hessian(slope, at)


def _loss_slope(loss: Tensor, z: Tensor, parameters: Parameters) -> Tensor:
    """``∇ℓ(z)`` with its graph; refuses a loss that also depends on the parameters past the outputs."""
    slope, *direct = torch.autograd.grad(
        loss, (z, *parameters.tensors), create_graph=True, allow_unused=True, materialize_grads=False
    )
    for name, part in zip(parameters.names, direct, strict=True):
        if part is not None:
            raise UsageError(
                f"the loss depends on parameter {name!r} directly, not only through the outputs, and Gauss-Newton would drop "
                "that part; use weight_decay, return it among the outputs, or use the Hessian"
            )
    return torch.zeros_like(z) if slope is None else slope


def _autograd_hessian(slope: Tensor, z: Tensor) -> OutputHessian:
    if not slope.requires_grad:
        return torch.zeros_like
    return lambda u: torch.autograd.grad(slope, z, u, retain_graph=True, materialize_grads=True)[0]
