"""A problem that goes wrong on one rank, at one step, in one place, in one way. Also a problem file of the trainer.

It goes wrong in the first attempt alone, and not after a restart.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dhf


class Trap:
    """Does what is asked of it, once."""

    def __init__(self, fault: str, seconds: float) -> None:
        self.fault, self.seconds = fault, seconds

    def __call__(self, x: Tensor) -> Tensor:
        if self.fault == "raise":
            raise RuntimeError("a fault of the test")
        if self.fault == "memory":
            raise torch.OutOfMemoryError("simulated: no 12 GiB left")
        if self.fault == "poison":
            return x * float("nan")
        if self.fault == "sleep":
            time.sleep(self.seconds)
        elif self.fault:
            os.kill(os.getpid(), getattr(signal, self.fault))
        return x


class Faulty(dhf.Objective):
    """Cross-entropy of a small network, and a trap.

    Args:
        place: In which part of a step: ``"forward"``, ``"product"`` or ``"search"``.
        trap: What happens there, or None on a rank without a fault.
        at: The step, counted from 1; the graphs built before the first step are step 0. 0 for every step.
        product: Which product of the step.
    """

    def __init__(self, module: nn.Module, place: str, trap: Trap | None, at: int, product: int = 3) -> None:
        super().__init__(module, nn.CrossEntropyLoss())
        self._place, self._trap, self._at, self._product = place, trap, at, product
        self.step, self._products = -1, 0

    def outputs(self, batch: Any) -> Tensor:
        z = super().outputs(batch)
        if torch.is_grad_enabled():
            self.step += 1
            self._products = 0
            if self._place == "product" and self._trap is not None:
                return hooked(z, self.on_product)
        place = "forward" if torch.is_grad_enabled() else "search"
        return self.spring(z) if place == self._place else z

    def spring(self, x: Tensor) -> Tensor:
        """The trap, if this is its step."""
        return self._trap(x) if self._trap is not None and self.step > 0 and self._at in (0, self.step) else x

    def on_product(self, x: Tensor) -> Tensor:
        """Called in the middle of each product."""
        self._products += 1
        return self.spring(x) if self._products == self._product else x


def hooked(z: Tensor, hook: Callable[[Tensor], Tensor]) -> Tensor:
    """z, whose second derivative passes through a hook."""
    return _Hooked.apply(z, hook, 2)


class _Hooked(torch.autograd.Function):
    """The identity, whose derivative of this order passes through the hook."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, hook: Callable[[Tensor], Tensor], order: int) -> Tensor:
        ctx.hook, ctx.order = hook, order
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        passed = ctx.hook(gradient) if ctx.order == 1 else _Hooked.apply(gradient, ctx.hook, ctx.order - 1)
        return passed, None, None


def build(
    fault: str = "",
    place: str = "product",
    rank: int = -1,
    at: int = 2,
    seconds: float = 0.0,
    pause: float = 0.0,
    samples: int = 24,
    width: int = 6,
    differs: str = "",
    product: int = 3,
) -> dhf.Problem:
    """The problem; ``rank`` names where the fault is, ``pause`` makes each step last, ``differs`` is what that rank has apart."""
    mine = rank == int(os.environ.get("RANK", "0")) and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples + (mine and differs == "samples"), 5, generator=generator)
    y = torch.randint(0, 3, (len(x),), generator=generator)
    if mine and differs == "data":
        x[-1, -1] += 1e-6
    if mine and differs == "width":
        width += 1
    module = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3))
    if mine and differs == "extra":
        module[2].register_parameter("extra", nn.Parameter(torch.zeros(())))
    if mine and differs == "weights":
        with torch.no_grad():
            module[0].bias[0] += 1e-12
    trap = Trap(fault, seconds) if mine and fault else None
    objective = Faulty(module, place, trap, at, product)

    def metrics(module: nn.Module) -> dict[str, float]:
        time.sleep(pause)
        if place == "metrics":
            objective.spring(torch.zeros(()))
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return {"resident": resident, "files": len(os.listdir("/proc/self/fd"))}

    return dhf.Problem(objective, (x, y), metrics=metrics)
