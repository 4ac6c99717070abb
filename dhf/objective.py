"""Objective, LeastSquares: what a rank differentiates.

f(θ) = 1/N Σ_i ℓ(outputs(θ, x_i), y_i) + ½ weight_decay ‖θ‖²
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dhf.errors import UsageError
from dhf.losses import HalfSquaredNorm, Loss, MeanSquaredError, OutputHessian, as_loss

__all__ = ["LeastSquares", "Objective", "require_objective", "rows", "select"]


class Objective:
    """A mean loss over samples, of a module's outputs.

    Override :meth:`outputs`, :meth:`loss` and :meth:`count` for batches or losses of another form.

    Args:
        module: Any module of differentiable operations. Wrappers made by DistributedDataParallel, DataParallel and
            torch.compile are taken off; FSDP cannot be and is refused.
        loss: One of torch's loss modules or their functionals (compared with ``batch[1]``; MSE, cross-entropy and
            BCE-with-logits have their output Hessians built in), or a callable ``loss(outputs, batch)`` that returns
            the mean over the batch's samples as a 0-dim tensor.
        weight_decay: Coefficient of ``½‖θ‖²`` over all trainable parameters. Dimensionless.

    Raises:
        UsageError: If the module or the loss cannot be used.

    Example:
        >>> import torch
        >>> objective = Objective(torch.nn.Linear(2, 1), torch.nn.MSELoss())
        >>> batch = (torch.ones(3, 2), torch.zeros(3, 1))
        >>> objective.loss(objective.outputs(batch), batch).shape, objective.count(batch)
        (torch.Size([]), 3)
    """

    def __init__(
        self,
        module: torch.nn.Module,
        loss: Callable[..., Tensor] | None = None,
        *,
        weight_decay: float = 0.0,
    ) -> None:
        if not weight_decay >= 0:
            raise UsageError(f"weight_decay must not be negative, got {weight_decay}")
        if not isinstance(module, torch.nn.Module):
            raise UsageError(f"an Objective needs a torch.nn.Module, got {type(module).__name__}")
        if loss is None and type(self).loss is Objective.loss:
            raise UsageError("an Objective needs a loss: pass one, or override loss(outputs, batch)")
        self.module = unwrap(module)
        self.weight_decay = float(weight_decay)
        self._function = loss
        self._known: Loss | None = as_loss(loss)

    def outputs(self, batch: Any) -> Tensor:
        """The module's outputs for a batch ``(inputs, targets)``, one tensor of shape (N, ...)."""
        inputs, _ = batch
        return self.module(inputs)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """The mean loss over the batch's samples, a 0-dim tensor."""
        if self._known is not None:
            return self._known(outputs, _targets(batch))
        assert self._function is not None
        return self._function(outputs, batch)

    def count(self, batch: Any) -> float:
        """The batch's weight in the mean over all data: its number of samples, for most losses."""
        if self._known is not None and type(self).loss is Objective.loss and isinstance(batch, (tuple, list)):
            return self._known.count(_targets(batch))
        return rows(batch)

    def known_loss(self) -> Loss | None:
        """The loss with a closed-form output Hessian, unless a subclass has overridden :meth:`loss`."""
        return self._known if type(self).loss in (Objective.loss, LeastSquares.loss) else None

    @property
    def is_least_squares(self) -> bool:
        """Whether the loss is a sum of squares of residuals that are affine in the outputs."""
        return isinstance(self.known_loss(), (HalfSquaredNorm, MeanSquaredError))

    def output_hessian(self, outputs: Tensor, batch: Any) -> OutputHessian | None:
        """The product with the mean loss's Hessian in the outputs, or None where autograd must find it."""
        known = self.known_loss()
        return None if known is None else known.hessian(outputs, _targets(batch))

    def check(self, outputs: Tensor, batch: Any) -> None:
        """Raise UsageError if the outputs or targets of this batch cannot be used."""
        if not isinstance(outputs, Tensor):
            raise UsageError(
                f"outputs(batch) returned {type(outputs).__name__}, not one tensor; override Objective.outputs to pick it"
            )
        known = self.known_loss()
        if known is not None:
            known.check(outputs, _targets(batch))


class LeastSquares(Objective):
    """Half the mean squared norm of residuals: ``f(θ) = 1/2N Σ_i ‖r_i(θ)‖²``.

    Override :meth:`outputs` to return the residuals, shape (N,) or (N, k), with N = ``count(batch)``.

    Args:
        module: The module whose parameters the residuals depend on.
        weight_decay: As in :class:`Objective`.
    """

    def __init__(self, module: torch.nn.Module, *, weight_decay: float = 0.0) -> None:
        super().__init__(module, HalfSquaredNorm(), weight_decay=weight_decay)

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Half the mean squared residual norm, a 0-dim tensor."""
        return HalfSquaredNorm()(outputs)

    def check(self, outputs: Tensor, batch: Any) -> None:
        """Raise UsageError unless there is one row of residuals per sample."""
        if not isinstance(outputs, Tensor) or outputs.dim() not in (1, 2) or outputs.shape[0] != self.count(batch):
            shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise UsageError(
                f"LeastSquares.outputs must return residuals of shape (N,) or (N, k) with N = {self.count(batch)} samples, "
                f"got {shape}; override count(batch) if the batch holds another number"
            )


def require_objective(given: Any) -> None:
    """Raise UsageError unless this is an Objective."""
    if not isinstance(given, Objective):
        raise UsageError(f"expected a dhf.Objective, got {type(given).__name__}; use dhf.Objective(module, loss)")


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside the wrappers that dhf can take off; UsageError for those it cannot."""
    while True:
        if isinstance(module, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
            module = module.module
        elif type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod"):
            module = module.get_submodule("_orig_mod")
        else:
            break
    for path, child in module.named_modules():
        where = f"submodule {path!r}" if path else "the module"
        if "FullyShardedDataParallel" in type(child).__name__ or "FSDPModule" in [
            c.__name__ for c in type(child).__mro__
        ]:
            raise UsageError(
                f"{where} is wrapped by FSDP, which cannot be differentiated twice; pass the module before fully_shard"
            )
        if isinstance(child, torch.nn.parallel.DistributedDataParallel) or (
            type(child).__name__ == "OptimizedModule" or getattr(child, "_compiled_call_impl", None) is not None
        ):
            raise UsageError(
                f"{where} ({type(child).__name__}) is compiled or wrapped, and cannot be differentiated twice; "
                "pass the plain module"
            )
    return module


def rows(batch: Any) -> int:
    """Samples in a batch: the leading dimension of the first tensor found in a nest of tuples, lists and mappings."""
    first = _first_tensor(batch)
    if first is None or first.dim() == 0:
        raise UsageError("found no tensor with a leading dimension in the batch; override Objective.count(batch)")
    return first.shape[0]


def select(batch: Any, index: Tensor | slice) -> Any:
    """The samples ``index`` of a batch: every tensor that has the batch's leading dimension is indexed."""
    size = rows(batch)

    def pick(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part[index] if part.dim() and part.shape[0] == size else part
        if isinstance(part, Mapping):
            return {key: pick(value) for key, value in part.items()}
        if isinstance(part, tuple) and hasattr(part, "_fields"):
            return type(part)(*map(pick, part))
        if isinstance(part, (tuple, list)):
            return type(part)(map(pick, part))
        return part

    return pick(batch)


def _targets(batch: Any) -> Any:
    return batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return next((t for t in map(_first_tensor, parts) if t is not None), None)
