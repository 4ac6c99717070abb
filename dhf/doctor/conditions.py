"""as_in_a_run: the conditions under which dhf evaluates an objective: random numbers, buffers and kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from dhf.evaluation import micro_batch_seeds, reproducible, twice_differentiable
from dhf.objective import Objective
from dhf.parameters import Parameters

__all__ = ["as_in_a_run"]


@contextlib.contextmanager
def as_in_a_run(objective: Objective, seed: int) -> Iterator[None]:
    """The conditions of rank 0's first micro-batch in a run with this seed."""
    device = Parameters(objective.module).device
    (own,) = micro_batch_seeds(seed, 0, 1)
    with torch.enable_grad(), reproducible(objective, device, own), twice_differentiable(objective.module, device):
        yield
