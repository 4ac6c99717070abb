"""Problem: what a run trains, on what, and what it reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import Dataset

from dhf.objective import Objective

__all__ = ["Problem", "match_module"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model with its data. A user's own ``build(...)`` returns one.

    Attributes:
        objective: What is minimised; it owns the module.
        train: A map-style dataset, or a tuple of tensors with one leading dimension. A batch is what torch's
            ``default_collate`` makes of its samples.
        validation: The same, held out; dhf reports its loss over all ranks. None for none.
        metrics: ``metrics(module)`` gives more numbers by name, taken on rank 0 after a step; None for none.
        pictures: ``pictures(module, folder)`` draws files into a folder at the end, on rank 0, and returns their paths. Under
            ``dhf plot``, matplotlib's settings are those of the ground and format asked for: a figure made by
            ``matplotlib.figure.Figure`` follows them, and so does ``savefig`` to a name without suffix.
        dtype: ``"float32"`` or ``"float64"``: what parameters and data become where the user does not say otherwise.
    """

    objective: Objective
    train: Dataset[Any] | Sequence[torch.Tensor]
    validation: Dataset[Any] | Sequence[torch.Tensor] | None = None
    metrics: Callable[[torch.nn.Module], Mapping[str, float]] | None = None
    pictures: Callable[[torch.nn.Module, Path], list[Path]] | None = None
    dtype: Literal["float32", "float64"] = "float32"


def match_module(x: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    """x on the device and in the dtype of the module's parameters."""
    first = next(module.parameters())
    return x.to(first.device, first.dtype)
