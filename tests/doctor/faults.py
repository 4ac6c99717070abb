"""Tiny problems, each with exactly one fault, and one without: a file that ``--problem`` takes."""

from __future__ import annotations

import itertools
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import dhf

CUDNN = (
    "Double backwards is not supported for CuDNN RNNs due to limitations in the CuDNN API. To run double backwards, please "
    "disable the CuDNN backend temporarily while running the forward pass of your RNN."
)  # what torch says on a GPU


class FlashAttention(nn.Module):
    """Asks for a fused kernel by name, past what dhf has set."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).view(len(x), 1, 4, 3, 4).unbind(3)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)[:, 0, 0]


class SelfAttention(nn.Module):
    """torch's own, which dhf runs by the MATH kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0].mean(1)


class Recurrent(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.rnn = kind(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]


class _Fused(torch.autograd.Function):
    """A function without a second derivative, as cuDNN's."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return _FusedBackward.apply(g, *ctx.saved_tensors)


class _FusedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g: Tensor, x: Tensor) -> Tensor:
        return g * (1 - x.tanh() ** 2)

    @staticmethod
    def backward(ctx, *_: Tensor) -> Tensor:
        raise RuntimeError(CUDNN)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh() ** 2)


class _Wrong(torch.autograd.Function):
    """tanh, whose backward forgets a factor."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * (1 - x.tanh() ** 2).sqrt()


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Drift(nn.Module):
    """Another function at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = itertools.count(1)

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 / next(self.calls))


class Slope(dhf.LeastSquares):
    """Residuals with a derivative in the input, as of a PDE."""

    def outputs(self, batch):
        (x,) = batch
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(self.module(x).square().sum(), x, create_graph=True)[0] - 1.0


class CarefulSlope(Slope):
    def outputs(self, batch):
        with torch.enable_grad():
            return super().outputs(batch)


def slope(careful: bool = False) -> dhf.Problem:
    body = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.rand(10, 2, generator=torch.Generator().manual_seed(2))
    return dhf.Problem((CarefulSlope if careful else Slope)(body), (x,), dtype="float64")


class OfDictionaries(dhf.Objective):
    """Batches as Hugging Face makes them, by a collate function of the user's."""

    def outputs(self, batch):
        return self.module(batch["input"])

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch["label"])

    def count(self, batch):
        return len(batch["label"])


def dictionaries() -> dhf.Problem:
    generator = torch.Generator().manual_seed(3)
    samples = [(torch.randn(4, generator=generator), i % 3) for i in range(11)]

    def collate(chosen):
        inputs, labels = zip(*chosen, strict=True)
        return {"input": torch.stack(inputs), "label": torch.tensor(labels)}

    body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    return dhf.Problem(OfDictionaries(body), torch.utils.data.DataLoader(samples, batch_size=4, collate_fn=collate))


def build(fault: str = "") -> dhf.Problem:
    generator = torch.Generator().manual_seed(1)
    shape = (12, 4, 4) if fault in ("flash", "attention", "lstm", "gru") else (12, 4)
    x = torch.randn(*shape, generator=generator)
    if fault == "ill-conditioned":
        x = x * torch.tensor([1.0, 1e-1, 1e-2, 1e-3])
    y = torch.randn(12, 3, generator=generator)
    middle: dict[str, object] = {
        "flash": FlashAttention,
        "attention": SelfAttention,
        "lstm": lambda: Recurrent(nn.LSTM),
        "gru": lambda: Recurrent(nn.GRU),
        "cudnn": lambda: Apply(_Fused.apply),
        "once": lambda: Apply(_Once.apply),
        "wrong": lambda: Apply(_Wrong.apply),
        "dropout": lambda: nn.Dropout(0.5),
        "functional dropout": lambda: Apply(lambda t: F.dropout(t, 0.5)),
        "batchnorm": lambda: nn.BatchNorm1d(4),
        "compiled": lambda: torch.compile(nn.Linear(4, 4)),
        "compiled function": lambda: Apply(torch.compile(lambda t: t.tanh(), backend="aot_eager")),
        "unused": Unused,
        "shapes": lambda: nn.Linear(5, 4),
        "drift": Drift,
        "python random": lambda: Apply(lambda t: t * random.random()),
    }
    layer = middle.get(fault, nn.Tanh)()  # type: ignore[operator]
    body = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 3))
    losses = {
        "sum": lambda outputs, batch: (outputs - batch[1]).square().sum(),
        "sum by torch": nn.MSELoss(reduction="sum"),
        "pairs": lambda outputs, batch: (outputs - batch[1]).square().mean() + outputs.var(0).sum(),
        "detach": lambda outputs, batch: (outputs.detach() * outputs - batch[1]).square().mean(),
        "infinite": lambda outputs, batch: (outputs - batch[1]).square().mean() / 0.0,
    }
    objective = dhf.Objective(body, losses.get(fault, nn.MSELoss()))
    return dhf.Problem(objective, (x, y))
