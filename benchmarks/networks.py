"""The networks that the benchmarks measure on: a module, one batch, and a torch loss of (outputs, targets)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dhf.problems.autoencoder import sparse_initialisation

__all__ = ["Case", "Laplacian", "TanhCell", "autoencoder", "cases", "recurrent_cases"]


class Case(NamedTuple):
    """One network with one batch."""

    module: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: nn.Module

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Case:
        """The same numbers in another floating-point format, or on another device, on a copy of the module."""
        inputs, targets = (
            t.to(device, dtype if t.is_floating_point() else t.dtype) for t in (self.inputs, self.targets)
        )
        return Case(copy.deepcopy(self.module).to(device, dtype), inputs, targets, self.loss)


def autoencoder(widths: tuple[int, ...], batch: int) -> Case:
    """A sigmoid autoencoder with logits out, from Martens' sparse start, on random images."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Sigmoid()]
    module = nn.Sequential(*layers[:-1])
    sparse_initialisation(module, 15)
    images = torch.rand(batch, widths[0])
    return Case(module, images, images, nn.BCEWithLogitsLoss())


def convolutional() -> Case:
    """Three tanh convolutions and a linear layer on 32x32 images, batch 64."""
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(32 * 64, 10),
    )
    return Case(module, torch.randn(64, 3, 32, 32), torch.randint(0, 10, (64,)), nn.CrossEntropyLoss())


class _LastToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True, activation="gelu")
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(128, 50)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)[:, -1])


def transformer() -> Case:
    """Two encoder layers of width 128 on 32 sequences of 64 tokens."""
    return Case(_LastToken(), torch.randn(32, 64, 128), torch.randint(0, 50, (32,)), nn.CrossEntropyLoss())


class Laplacian(nn.Module):
    """Residual of Poisson's equation, its second derivatives taken by autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(self.network(x).sum(), x, create_graph=True)
        second = [torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
        return (second[0] + second[1]).unsqueeze(1)


def pinn() -> Case:
    """A physics-informed tanh network at 1,024 points."""
    return Case(Laplacian(), torch.rand(1024, 2), torch.zeros(1024, 1), nn.MSELoss())


_STEPS, _FEATURES, _HIDDEN = 100, 32, 128


class _LastStep(nn.Module):
    """A recurrent layer, and a linear one on its last step."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(_HIDDEN, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class TanhCell(nn.Module):
    """nn.RNN written as a loop over steps, which autograd sees one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.across = nn.Linear(_FEATURES, _HIDDEN), nn.Linear(_HIDDEN, _HIDDEN, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        states = [x.new_zeros(x.shape[0], _HIDDEN)]
        for inward in self.inward(x).unbind(1):
            states.append(torch.tanh(inward + self.across(states[-1])))
        return (torch.stack(states[1:], 1),)


def recurrent(layer: nn.Module) -> Case:
    """A recurrent layer over 32 sequences of 100 steps; its recurrent weights orthogonal, or little would reach the first."""
    for name, parameter in layer.named_parameters():
        if "hh" in name or "across" in name:
            for gate in parameter.data.split(_HIDDEN):
                if gate.dim() == 2:
                    nn.init.orthogonal_(gate)
    inputs, targets = torch.randn(32, _STEPS, _FEATURES), torch.randint(0, 10, (32,))
    return Case(_LastStep(layer), inputs, targets, nn.CrossEntropyLoss())


def cases() -> dict[str, Callable[[], Case]]:
    """Every network by name."""
    return {
        "deep autoencoder": lambda: autoencoder((784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784), 512),
        "CNN": convolutional,
        "transformer": transformer,
        "PINN": pinn,
    }


def recurrent_cases() -> dict[str, Callable[[], Case]]:
    """Networks over many steps by name."""
    return {
        "RNN": lambda: recurrent(nn.RNN(_FEATURES, _HIDDEN, batch_first=True)),
        "GRU": lambda: recurrent(nn.GRU(_FEATURES, _HIDDEN, batch_first=True)),
        "handwritten RNN": lambda: recurrent(TanhCell()),
    }
