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
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from dhf.curvature.forward_mode import outputs_along
from dhf.curvature.gradient import require_second_derivatives, rows_and_width, scalar_loss
from dhf.errors import UsageError
from dhf.losses import OutputHessian
from dhf.objective import Objective
from dhf.parameters import Parameters

__all__ = ["GaussNewton", "GaussNewtonGraph", "Jacobian", "PushedGraph", "loss_in_outputs"]


class GaussNewton(Protocol):
    """What can multiply with the Jacobian of one micro-batch and with its transpose: a Graph with two halves."""

    loss: Tensor
    gradient: Sequence[Tensor]
    rows: int
    width: int
    outputs: Tensor
    slope: Tensor
    output_hessian: OutputHessian

    def begin(self, first_row: int) -> None:
        """See :class:`dhf.curvature.Graph`."""

    def product(self, v: Sequence[Tensor]) -> Sequence[Tensor]:
        """``G v``."""

    def push(self, v: Sequence[Tensor]) -> Tensor:
        """``J v``, of the outputs' shape."""

    def pull(self, u: Tensor) -> Sequence[Tensor]:
        """``Jᵀ u``, one tensor per parameter."""


class GaussNewtonGraph:
    """The retained graphs of outputs and vector-Jacobian product of one micro-batch.

    Attributes:
        outputs: z, detached, shape (N, ...).
        slope: ∇ℓ(z) of the mean loss, of the same shape.
        output_hessian: The product with the Hessian of the mean loss in z; the Fisher matrix puts its own here.
    """

    def __init__(self, objective: Objective, parameters: Parameters, batch: Any) -> None:
        z = objective.outputs(batch)
        objective.check(z, batch)
        if not z.requires_grad:
            raise UsageError("the outputs do not depend on any trainable parameter; check for detach() or no_grad()")
        self.loss, self.slope, self.output_hessian = loss_in_outputs(objective, parameters, z, batch)
        self.outputs = z.detach()
        self.rows, self.width = rows_and_width(z)
        self._jacobian = Jacobian(objective, z, parameters.tensors, self.slope)
        self.gradient: Sequence[Tensor] = self._jacobian.pulled

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
        return self._jacobian.push(v)

    def pull(self, u: Tensor) -> Sequence[Tensor]:
        """``Jᵀ u``, one tensor per parameter, from a tensor of the outputs' shape."""
        return self._jacobian.pull(u)


class Jacobian:
    """``∂z/∂θ`` by the graphs of z and of ``Jᵀu``.

    Args:
        objective: Whose outputs they are.
        z: Outputs with their graph.
        tensors: θ.
        u: Any cotangent, of z's shape.

    Attributes:
        pulled: ``Jᵀu``.

    Raises:
        UsageError: If a function is marked once_differentiable.
    """

    def __init__(self, objective: Objective, z: Tensor, tensors: Sequence[Tensor], u: Tensor) -> None:
        self._z, self._tensors = z, tensors
        self._u = u.detach().clone().requires_grad_(True)
        pulled = torch.autograd.grad(z, tensors, self._u, create_graph=True, materialize_grads=True)
        require_second_derivatives(objective, pulled)
        self.pulled: Sequence[Tensor] = [g.detach() for g in pulled]
        # parameters the outputs do not depend on have no graph
        self._kept = [i for i, g in enumerate(pulled) if g.requires_grad]
        # edges, since the values of a gradient would be one flat vector per micro-batch
        self._graph = [get_gradient_edge(pulled[i]) for i in self._kept]

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
        return loss_in_outputs(self._objective, self._parameters, self._z, self._batch)[1]

    @functools.cached_property
    def output_hessian(self) -> OutputHessian:
        """See :class:`GaussNewtonGraph`."""
        known = self._objective.output_hessian(self.outputs, self._batch)
        return known or loss_in_outputs(self._objective, self._parameters, self._z, self._batch)[2]

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


def loss_in_outputs(
    objective: Objective, parameters: Parameters, z: Tensor, batch: Any
) -> tuple[Tensor, Tensor, OutputHessian]:
    """The mean loss as a function of the outputs: its value at z, ``∇ℓ(z)``, and the product with ``∇²ℓ(z)``.

    Raises:
        UsageError: If the loss is not one number, or also depends on the parameters past the outputs.
    """
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
