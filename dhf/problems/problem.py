"""Problem: what a run trains, on what, and what it reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from dhf.errors import UsageError
from dhf.objective import Objective
from dhf.problems.data import Data, as_data

__all__ = ["Problem", "match_module"]


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model with its data. A user's own ``build(...)`` returns one.

    Attributes:
        objective: What is minimised; it owns the module.
        train: The samples: a tuple of tensors with one leading dimension; a map-style data set or list of samples; a
            DataLoader, of which the data set, ``collate_fn`` and, for micro-batches, ``batch_size`` are taken; or another
            iterable of samples (a generator, an IterableDataset), which is read once, here, and kept. Every rank is given
            all of them: dhf divides and orders them itself. A batch is what ``collate_fn``, torch's ``default_collate`` where
            there is none, makes of samples.
        validation: The same, held out; dhf reports its loss over all ranks. None for none.
        metrics: ``metrics(module)`` gives more numbers by name, taken on rank 0 after a step; None for none.
        pictures: ``pictures(module, folder)`` draws files into a folder at the end, on rank 0, and returns their paths, or
            None. Under ``dhf plot``, matplotlib's settings are those of the ground and format asked for: a figure made by
            ``matplotlib.figure.Figure`` follows them, and so does ``savefig`` to a name without suffix.
        dtype: ``"float32"``, ``"float64"`` or torch's dtype of that name: what parameters and data become where the user does
            not say otherwise. By default that of the parameters where all of them are float64, else float32. A str once made.

    Raises:
        UsageError: If the data cannot be read, or are a loader that repeats samples, leaves some out or makes its own batches;
            or if the objective or the dtype is another thing.
    """

    objective: Objective
    train: Dataset[Any] | Sequence[Any] | DataLoader[Any] | Iterable[Any] | Data
    validation: Dataset[Any] | Sequence[Any] | DataLoader[Any] | Iterable[Any] | Data | None = None
    metrics: Callable[[torch.nn.Module], Mapping[str, float]] | None = None
    pictures: Callable[[torch.nn.Module, Path], list[Path] | None] | None = None
    dtype: Literal["float32", "float64"] | torch.dtype | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.objective, Objective):
            given = type(self.objective).__name__
            raise UsageError(f"a Problem needs a dhf.Objective, got {given}; use dhf.Objective(module, loss)")
        object.__setattr__(self, "dtype", self._dtype_in_words())
        for name in ("train", "validation"):
            given = getattr(self, name)
            data = None if given is None else as_data(given)
            # tensors and data sets stay as they are; an iterable can be read but once
            if data is not None and data.samples is not given and not isinstance(given, (tuple, list)):
                object.__setattr__(self, name, data)

    def _dtype_in_words(self) -> str:
        if self.dtype is None:
            trained = [p.dtype for p in self.objective.module.parameters() if p.requires_grad]
            return "float64" if trained and all(dtype == torch.float64 for dtype in trained) else "float32"
        name = str(self.dtype).removeprefix("torch.")
        if name not in ("float32", "float64"):
            raise UsageError(f"a Problem's dtype must be float32 or float64, got {self.dtype!r}")
        return name


def match_module(x: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    """x on the device and in the dtype of the module's parameters."""
    first = next(module.parameters())
    return x.to(first.device, first.dtype)
