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

from dhf.curvature.forward_mode import Outputs
from dhf.curvature.shard import MicroBatch
from dhf.errors import PerSampleError
from dhf.objective import Objective, rows, select
from dhf.parameters import Parameters

__all__ = ["add_squared_gradients", "output_jacobian"]

_CHUNK = 64  # samples whose gradients are held at once


def output_jacobian(
    objective: Objective,
    parameters: Parameters,
    batch: Any,
    *,
    width: int | None = None,
    chunk_size: int | None = None,
    verify: bool = True,
) -> tuple[Tensor, Tensor]:
    """``∂ outputs_i / ∂θ`` of every sample i, shape (N, k, n) with k outputs per sample; and the outputs, shape (N, ...).

    Args:
        objective: Whose outputs.
        parameters: With respect to what; flat, in their order.
        batch: One micro-batch, tensors of leading dimension N in any nest.
        width: k; found by evaluating the outputs where it is not given.
        chunk_size: Samples differentiated at once; all by default.
        verify: Whether to compare the outputs with those of the whole batch.

    Raises:
        PerSampleError: If vmap cannot enter the outputs (a nested ``torch.autograd.grad``, ``.item()``, data-dependent
            control flow, BatchNorm in training mode), or they are not those of the whole batch.
    """
    size = rows(batch)
    place, (flat, axes) = Outputs(objective), _flatten(batch, size)
    tensors = tuple(p.detach() for p in parameters.tensors)
    whole: Tensor | None = None
    if width is None or verify:
        with torch.enable_grad():  # outputs may hold a torch.autograd.grad of their own
            whole = objective.outputs(batch).detach()
        width = whole.numel() // size if size else 1

    def outputs_of_one(values: tuple[Tensor, ...], *parts: Any) -> tuple[Tensor, Tensor]:
        named = {f"module.{name}": value for name, value in zip(parameters.names, values, strict=True)}
        z = functional_call(place, named, (_rebuild(batch, iter(parts), size),))
        return z.reshape(()) if width == 1 else z.reshape(-1), z.detach()

    derivative = grad if width == 1 else jacrev
    try:
        split = vmap(derivative(outputs_of_one, has_aux=True), in_dims=(None, *axes), chunk_size=chunk_size)
        pieces, z = split(tensors, *flat)
    except Exception as error:
        raise _refusal("outputs", error) from error
    # parameters that are left out may have put a graph behind both
    pieces, z = tuple(piece.detach() for piece in pieces), z.detach().squeeze(1)
    if verify and whole is not None and not _close(z, whole):
        raise PerSampleError(
            "outputs of a sample alone differ from those in its batch: samples are not independent (normalisation over the "
            "batch, dropout) or their outputs are not rows"
        )
    return torch.cat([piece.reshape(size, width, -1) for piece in pieces], dim=2), z


def _close(z: Tensor, whole: Tensor) -> bool:
    slack = 1e3 * torch.finfo(whole.dtype).eps
    largest = float(whole.abs().max()) if whole.numel() else 0.0
    return z.shape == whole.shape and torch.allclose(z, whole, rtol=slack, atol=slack * largest)


def add_squared_gradients(objective: Objective, parameters: Parameters, part: MicroBatch, out: Tensor) -> None:
    """Add ``weight Σ_i c_i/c ∇f_i ∘ ∇f_i`` of a micro-batch to ``out``, shape (n,).

    c_i is what sample i counts in the mean loss (1 for most losses), c their sum.

    Raises:
        PerSampleError: If vmap cannot enter the loss.
    """
    place = Outputs(objective)
    tensors = tuple(p.detach() for p in parameters.tensors)

    def loss_of_one(values: tuple[Tensor, ...], *pieces: Any) -> Tensor:
        named = {f"module.{name}": value for name, value in zip(parameters.names, values, strict=True)}
        sample = _rebuild(part.batch, iter(pieces), part.rows)
        return objective.loss(functional_call(place, named, (sample,)), sample)

    flat, axes = _flatten(part.batch, part.rows)
    counts = _counts(objective, part)
    squares = [torch.zeros_like(t) for t in tensors]
    split = vmap(grad(loss_of_one), in_dims=(None, *axes))
    for index in counts.nonzero()[:, 0].split(_CHUNK):  # what counts nothing may have no mean loss
        chunk = [t if a is None else t[index.to(t.device)] for t, a in zip(flat, axes, strict=True)]
        try:
            gradients = split(tensors, *chunk)
        except Exception as error:
            raise _refusal("the loss", error) from error
        shares = (counts[index] / counts.sum()).to(parameters.device, parameters.dtype)
        for total, g in zip(squares, gradients, strict=True):
            total.add_(torch.tensordot(shares, g.detach().square(), 1))
    out.add_(parameters.flatten(squares), alpha=part.weight)


def _counts(objective: Objective, part: MicroBatch) -> Tensor:
    """What each sample counts in the mean loss, float64, shape (N,)."""
    if objective.count(part.batch) == part.rows:
        return torch.ones(part.rows, dtype=torch.float64)
    each = [objective.count(select(part.batch, slice(i, i + 1))) for i in range(part.rows)]
    return torch.tensor(each, dtype=torch.float64)


def _refusal(what: str, error: Exception) -> PerSampleError:
    words = (str(error).splitlines() or [""])[0]
    return PerSampleError(
        f"{what} cannot be differentiated sample by sample: write inner derivatives with torch.func, set dropout and BatchNorm "
        f"to eval(), and do without .item() and branches on values ({type(error).__name__}: {words})"
    )


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
