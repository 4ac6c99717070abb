"""A problem whose run waits for the test at one step, or fails on one rank. Runs on any launcher."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dhf

_BOUND = 90.0  # seconds


class Paced(dhf.Objective):
    """Cross-entropy, which fails in the forward pass of step ``at`` if told to."""

    def __init__(self, module: nn.Module, *, fails: bool, at: int) -> None:
        super().__init__(module, nn.CrossEntropyLoss())
        self._fails, self._at, self._graphs = fails, at, -1  # the first graphs come before the first step

    def outputs(self, batch: Any) -> Tensor:
        self._graphs += torch.is_grad_enabled()
        if self._fails and self._graphs >= self._at:
            raise RuntimeError("a fault of the test")
        return super().outputs(batch)


def build(go: str = "", at: int = 3, fault: int = -1) -> dhf.Problem:
    """The problem; after step ``at`` it waits until the file ``go`` is there, and rank ``fault`` fails in that step."""
    rank = int(next(os.environ[name] for name in ("RANK", "PMI_RANK", "SLURM_PROCID") if name in os.environ))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 5, generator=generator)
    y = torch.randint(0, 3, (24,), generator=generator)
    objective = Paced(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), fails=rank == fault, at=at)
    steps = 0

    def metrics(module: nn.Module) -> dict[str, float]:
        nonlocal steps
        steps += 1
        end = time.monotonic() + _BOUND
        while go and steps == at and not Path(go).exists() and time.monotonic() < end:
            time.sleep(0.05)
        return {}

    return dhf.Problem(objective, (x, y), metrics=metrics)
