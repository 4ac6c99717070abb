"""Losses whose Hessian in the outputs is known in closed form, and whose labels can be sampled.

Every loss is a mean over samples of ``ℓ(z_i, y_i)``. ``hessian`` gives the product of that mean's Hessian in the
outputs z with a vector of the outputs' shape. ``sampled_gradients`` gives ``c_i`` with ``E[c_i c_iᵀ] = ∇²ℓ`` under
the model's own predictive distribution, so that the Fisher matrix ``1/N Σ Jᵢᵀ cᵢ cᵢᵀ Jᵢ`` has the Gauss-Newton matrix as its
expectation (Martens, "New insights and perspectives on the natural gradient method", 2020, section 9).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dhf.errors import UsageError

__all__ = ["BinaryCrossEntropy", "CrossEntropy", "HalfSquaredNorm", "Loss", "MeanSquaredError", "as_loss"]

OutputHessian = Callable[[Tensor], Tensor]


class Loss(Protocol):
    """What dhf asks of a loss that compares outputs with targets."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over the samples, a 0-dim tensor."""

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise UsageError if the targets do not fit the outputs."""

    def count(self, targets: Tensor) -> float:
        """The weight of these samples in the mean over all data: usually how many there are."""

    def hessian(self, outputs: Tensor, targets: Tensor) -> OutputHessian | None:
        """The output Hessian as a product, or None where only autograd knows it."""

    def draws(self, outputs: Tensor) -> int | None:
        """Uniform numbers needed to sample the labels of one row, or None without a predictive distribution."""

    def sampled_gradients(self, outputs: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
        """``c`` of the outputs' shape, from float64 uniforms in (0, 1) of shape (rows, draws)."""

    def inner(self, c: Tensor, u: Tensor) -> Tensor:
        """``cᵢ·uᵢ`` for every sample i, in a shape that multiplies with ``c``."""


class _RowLoss:
    """Losses whose samples are the rows of the outputs."""

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        if outputs.shape != targets.shape:
            raise UsageError(
                f"outputs have shape {tuple(outputs.shape)} and targets {tuple(targets.shape)}; they must be equal"
            )

    def count(self, targets: Tensor) -> float:
        return targets.shape[0]

    def draws(self, outputs: Tensor) -> int | None:
        return math.prod(outputs.shape[1:])

    def inner(self, c: Tensor, u: Tensor) -> Tensor:
        return (c * u).flatten(1).sum(1).view(-1, *[1] * (c.dim() - 1)) if c.dim() > 1 else c * u


class MeanSquaredError(_RowLoss):
    """``mean (z - y)²`` over samples and components: torch's MSELoss."""

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs, targets)

    def hessian(self, outputs: Tensor, targets: Tensor) -> OutputHessian:
        return lambda u: u * (2.0 / outputs.numel())

    def sampled_gradients(self, outputs: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
        width = math.prod(outputs.shape[1:])
        return _normal(outputs, uniforms) * math.sqrt(2.0 / width)


class HalfSquaredNorm(_RowLoss):
    """``½ ‖r_i‖²`` averaged over samples; there are no targets, the outputs r are the residuals."""

    def __call__(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor:
        return 0.5 * outputs.square().sum() / outputs.shape[0]

    def hessian(self, outputs: Tensor, targets: Tensor | None = None) -> OutputHessian:
        return lambda u: u / outputs.shape[0]

    def sampled_gradients(self, outputs: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
        return _normal(outputs, uniforms)


class BinaryCrossEntropy(_RowLoss):
    """Binary cross-entropy of logits z with targets in [0, 1], averaged over samples.

    Args:
        components: ``"mean"`` averages over the components of a sample too (torch's BCEWithLogitsLoss);
            ``"sum"`` adds them up, so that the loss is a negative log-likelihood per sample in nats.
    """

    def __init__(self, components: str = "mean") -> None:
        if components not in ("mean", "sum"):
            raise ValueError(f"components must be 'mean' or 'sum', got {components!r}")
        self._sum = components == "sum"

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        mean = F.binary_cross_entropy_with_logits(outputs, targets)
        return mean * math.prod(outputs.shape[1:]) if self._sum else mean

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        super().check(outputs, targets)
        if not targets.is_floating_point():
            raise UsageError(
                f"binary cross-entropy needs floating-point targets, got {targets.dtype}; use targets.float()"
            )
        low, high = targets.min().item(), targets.max().item()
        if not (low >= 0 and high <= 1):
            raise UsageError(f"binary cross-entropy needs targets in [0, 1], found {low:g} to {high:g}; rescale them")

    def hessian(self, outputs: Tensor, targets: Tensor) -> OutputHessian:
        p = torch.sigmoid(outputs)
        diagonal = p * (1 - p) / (outputs.shape[0] if self._sum else outputs.numel())
        return lambda u: diagonal * u

    def sampled_gradients(self, outputs: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
        p = torch.sigmoid(outputs)
        c = p - (uniforms.view(outputs.shape) < p).to(p.dtype)
        return c if self._sum else c / math.sqrt(math.prod(outputs.shape[1:]))


class CrossEntropy:
    """Cross-entropy of logits, shape (N, C) or (N, C, ...), with class indices, shape (N) or (N, ...).

    The mean is over all targets that are not ``ignore_index``, weighted by ``weight`` of their class, as in torch;
    ``count`` is the sum of those weights, so that ranks and micro-batches add up to the same mean.
    """

    def __init__(self, weight: Tensor | None = None, ignore_index: int = -100, label_smoothing: float = 0.0) -> None:
        if weight is not None and label_smoothing:
            raise UsageError(
                "cross-entropy with both class weights and label smoothing is not a weighted mean; drop one"
            )
        self._weight, self._ignore, self._smoothing = weight, ignore_index, label_smoothing

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        weight = None if self._weight is None else self._weight.to(outputs)
        return F.cross_entropy(outputs, targets, weight, ignore_index=self._ignore, label_smoothing=self._smoothing)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        expected = (outputs.shape[0], *outputs.shape[2:])
        if targets.is_floating_point() or targets.shape != expected:
            raise UsageError(
                f"cross-entropy of outputs {tuple(outputs.shape)} needs class indices of shape {tuple(expected)}, "
                f"got {targets.dtype} of shape {tuple(targets.shape)}"
            )
        classes = outputs.shape[1]
        wrong = (targets != self._ignore) & ((targets < 0) | (targets >= classes))
        if wrong.any():
            first = tuple(int(i) for i in wrong.nonzero()[0])
            raise UsageError(
                f"target {int(targets[first])} of sample {first[0]} in its micro-batch is out of range: the outputs have "
                f"{classes} classes, so targets must be 0 to {classes - 1}"
            )

    def count(self, targets: Tensor) -> float:
        if self._weight is not None:
            kept = targets[targets != self._ignore]
            return float(self._weight.to(kept.device)[kept].sum())
        return int((targets != self._ignore).sum())

    def hessian(self, outputs: Tensor, targets: Tensor) -> OutputHessian:
        p = torch.softmax(outputs, 1)
        weighted = p * (self._target_weights(outputs, targets) / self.count(targets))
        return lambda u: weighted * (u - (p * u).sum(1, keepdim=True))

    def draws(self, outputs: Tensor) -> int | None:
        return None if self._weight is not None else math.prod(outputs.shape[2:])

    def sampled_gradients(self, outputs: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
        p = torch.softmax(outputs, 1)
        thresholds = uniforms.view(outputs.shape[0], 1, *outputs.shape[2:])
        labels = (p.cumsum(1) < thresholds).sum(1, keepdim=True).clamp_(max=outputs.shape[1] - 1)
        c = p.scatter_add(1, labels, torch.full_like(p[:, :1], -1.0))
        return c * self._target_weights(outputs, targets)

    def inner(self, c: Tensor, u: Tensor) -> Tensor:
        return (c * u).sum(1, keepdim=True)

    def _target_weights(self, outputs: Tensor, targets: Tensor) -> Tensor:
        kept = targets != self._ignore
        if self._weight is None:
            return kept.to(outputs.dtype).unsqueeze(1)
        return (self._weight.to(outputs)[targets.where(kept, 0)] * kept).unsqueeze(1)


class _TorchLoss(_RowLoss):
    """Any other torch loss module of outputs and targets that averages over samples; autograd knows its Hessian."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._loss = loss

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._loss(outputs, targets)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Nothing is known of what this loss accepts."""

    def count(self, targets: Tensor) -> float:
        if isinstance(self._loss, torch.nn.NLLLoss):  # averages over what it does not ignore
            return int((targets != self._loss.ignore_index).sum())
        return super().count(targets)

    def hessian(self, outputs: Tensor, targets: Tensor) -> None:
        return None

    def draws(self, outputs: Tensor) -> None:
        return None

    def sampled_gradients(self, outputs: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
        raise UsageError(f"{type(self._loss).__name__} has no predictive distribution to sample labels from")


def _normal(outputs: Tensor, uniforms: Tensor) -> Tensor:
    return torch.special.ndtri(uniforms).to(outputs.dtype).view(outputs.shape)


def as_loss(loss: object) -> Loss | None:
    """The Loss for one of ours, for a torch loss module or for its functional; None for any other callable.

    Raises:
        UsageError: For a torch loss whose reduction is not a mean over samples.
    """
    if isinstance(loss, (MeanSquaredError, HalfSquaredNorm, BinaryCrossEntropy, CrossEntropy, _TorchLoss)):
        return loss
    functional: dict[object, type] = {
        F.mse_loss: MeanSquaredError,
        F.cross_entropy: CrossEntropy,
        F.binary_cross_entropy_with_logits: BinaryCrossEntropy,
    }
    if callable(loss) and loss in functional:
        return functional[loss]()
    if not isinstance(loss, torch.nn.modules.loss._Loss):
        return None
    if loss.reduction != "mean":
        raise UsageError(
            f"{type(loss).__name__} has reduction={loss.reduction!r}; dhf minimises a mean over samples: use reduction='mean'"
        )
    if isinstance(loss, torch.nn.MSELoss):
        return MeanSquaredError()
    if isinstance(loss, torch.nn.CrossEntropyLoss):
        return CrossEntropy(loss.weight, loss.ignore_index, loss.label_smoothing)
    if isinstance(loss, torch.nn.BCEWithLogitsLoss) and loss.weight is None and loss.pos_weight is None:
        return BinaryCrossEntropy()
    if getattr(loss, "weight", None) is not None and isinstance(loss, torch.nn.NLLLoss):
        raise UsageError("NLLLoss with class weights is not a mean over samples; use CrossEntropyLoss on logits")
    return _TorchLoss(loss)
