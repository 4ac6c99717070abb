"""Small models in float64, with data and objectives, and their curvature as dense matrices.

The matrices are taken by ``torch.func.functional_call`` and ``torch.autograd.functional`` on the whole batch and
share no code with dhf.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.nn.attention import SDPBackend, sdpa_kernel

import dhf

CLASSES = 3


class Recurrent(nn.Module):
    """A GRU read out at its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(2, 3, batch_first=True)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


class Attention(nn.Module):
    """Self-attention over four tokens, then their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Encoder(nn.Module):
    """A transformer's encoder layer without dropout, in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, dim_feedforward=5, dropout=0.0, activation="gelu", batch_first=True)
        self.layer = layer.eval()
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


def mlp() -> nn.Module:
    """4 - 5 - 3 with tanh: 43 parameters."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def cnn() -> nn.Module:
    """A convolution, a pooling and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2 * 2 * 2, CLASSES)
    )


def layernorm() -> nn.Module:
    """Normalised hidden layer."""
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, CLASSES))


def embedding() -> nn.Module:
    """Token indices, embedded, flattened and mixed."""
    return nn.Sequential(nn.Embedding(6, 3), nn.Flatten(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, CLASSES))


def _normal(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape, dtype=torch.float64)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (mlp, _normal(4)),
    "cnn": (cnn, _normal(1, 4, 4)),
    "gru": (Recurrent, _normal(4, 2)),
    "attention": (Attention, _normal(4, 4)),
    "encoder": (Encoder, _normal(3, 4)),
    "layernorm": (layernorm, _normal(4)),
    "embedding": (embedding, lambda n: torch.randint(0, 6, (n, 2))),
}


def soft_margin(outputs: Tensor, batch: Any) -> Tensor:
    """A convex loss of which dhf has no closed form; it couples the outputs of a sample."""
    return (F.softplus(-outputs * batch[1]).sum(1) + torch.logsumexp(outputs, 1)).mean()


def _signs(n: int) -> Tensor:
    return 2.0 * torch.randint(0, 2, (n, CLASSES)).double() - 1.0


# name -> (what the objective is given, the plain mean loss of (outputs, targets), targets)
LOSSES: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor], Callable[[int], Tensor]]] = {
    "mse": (nn.MSELoss(), lambda z, y: ((z - y) ** 2).mean(), _normal(CLASSES)),
    "cross_entropy": (
        nn.CrossEntropyLoss(),
        lambda z, y: -torch.log_softmax(z, 1)[torch.arange(len(y)), y].mean(),
        lambda n: torch.randint(0, CLASSES, (n,)),
    ),
    "bce": (
        nn.BCEWithLogitsLoss(),
        lambda z, y: -(y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z)).mean(),
        lambda n: torch.rand(n, CLASSES, dtype=torch.float64),
    ),
    "soft_margin": (soft_margin, lambda z, y: soft_margin(z, (None, y)), _signs),
}


def problem(
    model: str = "mlp", loss: str = "mse", samples: int = 7, weight_decay: float = 0.0, seed: int = 0
) -> tuple[dhf.Objective, tuple[Tensor, Tensor]]:
    """An objective and its one batch; the same on every call and every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        build, inputs = MODELS[model]
        module = build().double()
        batch = inputs(samples), LOSSES[loss][2](samples)
    return dhf.Objective(module, LOSSES[loss][0], weight_decay=weight_decay), batch


def split(batch: Any, sizes: list[int]) -> list[Any]:
    """Micro-batches of these sizes, in order."""
    return list(zip(*(part.split(sizes) for part in batch), strict=True))


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that a flat vector is made of, by name."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def flat(tensors: Any) -> Tensor:
    """One vector of several tensors."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def at_flat(module: nn.Module, inputs: Any) -> Callable[[Tensor], Tensor]:
    """The module's outputs as a function of the flat vector."""
    named = trainable(module)

    def outputs(theta: Tensor) -> Tensor:
        pieces = theta.split([p.numel() for p in named.values()])
        values = {name: piece.view(p.shape) for (name, p), piece in zip(named.items(), pieces, strict=True)}
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.functional_call(module, values, (inputs,))

    return outputs


def dense_hessian(
    module: nn.Module, batch: Any, loss: Callable[[Tensor, Tensor], Tensor], decay: float = 0.0
) -> Tensor:
    """∇²(loss + ½ decay ‖θ‖²) in the flat vector."""
    outputs = at_flat(module, batch[0])
    theta = flat(trainable(module).values())
    return hessian(lambda t: loss(outputs(t), batch[1]) + 0.5 * decay * (t @ t), theta)


def dense_jacobian(module: nn.Module, inputs: Any) -> Tensor:
    """∂ outputs / ∂θ, shape (number of output numbers, n)."""
    outputs = at_flat(module, inputs)
    return jacobian(lambda t: outputs(t).reshape(-1), flat(trainable(module).values()))


def dense_gauss_newton(
    module: nn.Module, batch: Any, loss: Callable[[Tensor, Tensor], Tensor], decay: float = 0.0
) -> Tensor:
    """Jᵀ H_z J + decay·I, H_z the Hessian of the mean loss in all outputs of the batch."""
    z = module_outputs(module, batch[0])
    H_z = hessian(lambda u: loss(u, batch[1]), z).reshape(z.numel(), z.numel())
    J = dense_jacobian(module, batch[0])
    return J.T @ H_z @ J + decay * torch.eye(J.shape[1], dtype=J.dtype)


def module_outputs(module: nn.Module, inputs: Any) -> Tensor:
    """The module's outputs, detached."""
    with torch.no_grad():
        return module(inputs)


def dense(operator: Any) -> Tensor:
    """An operator's columns, one product each."""
    n = operator.shape[0]
    return torch.stack([operator @ e for e in torch.eye(n, dtype=operator.dtype, device=operator.device)], dim=1)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest entry of the truth."""
    return float((found - truth).abs().max() / truth.abs().max())
