"""Per-sample derivatives of one micro-batch, by vmap over samples: the Jacobian of every sample's outputs, all rows at once.

One backward pass per row would cost a gradient each; a vectorised per-sample function costs a few gradients for all rows.
Each sample is seen by the objective as a batch of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap

from dhf.errors import UsageError
from dhf.objective import Objective, rows
from dhf.parameters import Parameters

__all__ = ["PerSampleError", "output_jacobian"]


class PerSampleError(UsageError):
    """The objective's outputs cannot be differentiated sample by sample."""


def output_jacobian(
    objective: Objective, parameters: Parameters, batch: Any, *, chunk_size: int | None = None, verify: bool = True
) -> tuple[Tensor, Tensor]:
    """``∂ outputs_i / ∂θ`` of every sample i, shape (N, k, n) with k outputs per sample; and the outputs, shape (N, ...).

    Args:
        objective: Whose outputs.
        parameters: With respect to what; flat, in their order.
        batch: One micro-batch, tensors of leading dimension N in any nest.
        chunk_size: Samples differentiated at once; all by default.
        verify: Whether to compare the outputs with those of the whole batch.

    Raises:
        PerSampleError: If vmap cannot enter the outputs (a nested ``torch.autograd.grad``, ``.item()``, data-dependent
            control flow, BatchNorm in training mode), or they are not those of the whole batch.
    """
    size = rows(batch)
    place, (flat, axes) = _Outputs(objective), _flatten(batch, size)
    tensors = tuple(p.detach() for p in parameters.tensors)
    with torch.no_grad():
        whole = objective.outputs(batch)
    width = whole.numel() // size if size else 1

    def outputs_of_one(values: tuple[Tensor, ...], *parts: Any) -> tuple[Tensor, Tensor]:
        named = {f"module.{name}": value for name, value in zip(parameters.names, values, strict=True)}
        z = functional_call(place, named, (_rebuild(batch, iter(parts), size),)).reshape(-1)
        return z.reshape(()) if width == 1 else z, z.detach()

    derivative = grad if width == 1 else jacrev
    try:
        split = vmap(derivative(outputs_of_one, has_aux=True), in_dims=(None, *axes), chunk_size=chunk_size)
        pieces, z = split(tensors, *flat)
    except Exception as error:
        words = (str(error).splitlines() or [""])[0]
        raise PerSampleError(
            f"outputs cannot be differentiated sample by sample ({type(error).__name__}: {words})"
        ) from error
    slack = 1e3 * torch.finfo(whole.dtype).eps
    z = z.reshape(whole.shape)
    if verify and not torch.allclose(z, whole, rtol=slack, atol=slack * float(whole.abs().max())):
        raise PerSampleError(
            "outputs of a sample alone differ from those in its batch: samples are not independent (normalisation over the "
            "batch, dropout) or their outputs are not rows"
        )
    return torch.cat([piece.reshape(size, width, -1) for piece in pieces], dim=2), z


class _Outputs(torch.nn.Module):
    """The objective's outputs as a module, so that its parameters can be put in from outside."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.module = objective.module
        self._objective = [objective]  # in a list, so that it is not taken for a submodule

    def forward(self, batch: Any) -> Tensor:
        return self._objective[0].outputs(batch)


def _flatten(batch: Any, size: int) -> tuple[list[Tensor], list[int | None]]:
    """The tensors of a batch in order, each with a dimension of one for the batch that a sample makes, and where to split."""
    if isinstance(batch, Tensor):
        split = bool(batch.dim()) and batch.shape[0] == size
        return [batch.unsqueeze(1) if split else batch], [0 if split else None]
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    found = [_flatten(part, size) for part in parts]
    return [t for tensors, _ in found for t in tensors], [a for _, axes in found for a in axes]


def _rebuild(batch: Any, tensors: Any, size: int) -> Any:
    """A batch of the same form from other tensors."""
    if isinstance(batch, Tensor):
        return next(tensors)
    if isinstance(batch, Mapping):
        return {key: _rebuild(value, tensors, size) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_rebuild(value, tensors, size) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_rebuild(value, tensors, size) for value in batch)
    return batch
