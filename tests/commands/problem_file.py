"""A problem file for commands, and its curvature as dense matrices that share no code with dhf."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tests.models import dense_gauss_newton, dense_hessian, trainable

FILE = """
import os
import torch, dhf

def build(
    samples: int = 13, width: int = 4, loss: str = "cross_entropy", fault: str = "", form: str = "tensors"
) -> dhf.Problem:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 3, generator=generator, dtype=torch.float64)
    module = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Tanh(), torch.nn.Linear(width, 2))
    y = torch.randint(0, 2, (samples,), generator=generator)
    if loss == "mse":
        y = torch.randn(samples, 2, generator=generator, dtype=torch.float64)
    if fault == "one-rank" and os.environ.get("RANK") == "1":
        raise OSError("this host has no such disk")
    loss = torch.nn.MSELoss() if loss == "mse" else torch.nn.CrossEntropyLoss()
    train, held_out = (x, y), (x[:4] + 0.5, y[:4])
    if form == "loader":
        train, held_out = (torch.utils.data.DataLoader(list(zip(*data)), batch_size=3) for data in (train, held_out))
    if form == "list":
        train, held_out = list(zip(*train)), list(zip(*held_out))
    return dhf.Problem(dhf.Objective(module, loss), train, validation=held_out, dtype="float64")
"""


def write_file(folder: Path) -> None:
    """Put the file into a folder."""
    (folder / "mine.py").write_text(FILE)


def built(**options: object) -> tuple[torch.nn.Module, tuple[Tensor, Tensor]]:
    """The module that a run with seed 0 starts from, and its data."""
    namespace: dict = {}
    exec(FILE, namespace)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # random numbers differ between dtypes
    torch.manual_seed(0)
    try:
        problem = namespace["build"](**options)
    finally:
        torch.set_default_dtype(before)
    return problem.objective.module, problem.train


def plain_loss(name: str):
    """The mean loss of (outputs, targets) in plain torch."""
    return torch.nn.functional.mse_loss if name == "mse" else torch.nn.functional.cross_entropy


def gradient(module: torch.nn.Module, data: tuple[Tensor, Tensor], loss: str) -> Tensor:
    """The gradient, flat, by autograd on the whole batch."""
    value = plain_loss(loss)(module(data[0]), data[1])
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(module.parameters()))])


def matrix(module: torch.nn.Module, data: tuple[Tensor, Tensor], loss: str, curvature: str) -> Tensor:
    """The Hessian or Gauss-Newton matrix."""
    assert trainable(module)
    make = dense_hessian if curvature == "hessian" else dense_gauss_newton
    return make(module, data, plain_loss(loss))
