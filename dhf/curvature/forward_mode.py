"""Outputs and their derivative along one vector, in one pass: for a product whose graph is not kept.

Parameters are dual numbers θ + ε v, and so z = outputs(θ + ε v) = z + ε J v. What z itself leaves behind is the ordinary graph,
through which Jᵀ goes afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call

from dhf.objective import Objective
from dhf.parameters import Parameters

__all__ = ["Outputs", "outputs_along"]


class Outputs(torch.nn.Module):
    """The objective's outputs as a module, so that its parameters can be put in from outside."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.module = objective.module
        self._objective = [objective]  # in a list, so that it is not taken for a submodule

    def forward(self, batch: Any) -> Tensor:
        return self._objective[0].outputs(batch)


def outputs_along(
    objective: Objective, parameters: Parameters, batch: Any, v: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """z with its graph, and ``J v`` of the same shape.

    Args:
        objective: Whose outputs.
        parameters: With respect to what.
        batch: One micro-batch.
        v: One tensor per parameter.

    Raises:
        NotImplementedError, RuntimeError: Where something in the module has no forward derivative.
    """
    with forward_ad.dual_level():
        duals = {
            f"module.{name}": forward_ad.make_dual(p, piece)
            for name, p, piece in zip(parameters.names, parameters.tensors, v, strict=True)
        }
        z, Jv = forward_ad.unpack_dual(functional_call(Outputs(objective), duals, (batch,)))
    return z, torch.zeros_like(z) if Jv is None else Jv.detach()
