"""as_data(): training data in the form that shards are cut from: samples by index, and how a batch is made of them.

Taken are a tuple of tensors, a map-style data set, a DataLoader, and any other iterable of samples. A loader's sampler is not
followed, since dhf divides and orders the samples itself; so one that would change how often a sample counts is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from dhf.byte_size import bytes_in_words
from dhf.errors import UsageError
from dhf.memory import available_memory

__all__ = ["Chosen", "Data", "Samples", "as_data", "some_of"]

Samples = Dataset[Any] | Sequence[Any]  # with len() and []

_LEAST_BYTES = 64  # that any object takes
_LOOK_EVERY = 1024  # samples


@dataclasses.dataclass(frozen=True, slots=True)
class Data:
    """Samples, and how they become a batch.

    Attributes:
        samples: A map-style data set: ``len(samples)`` and ``samples[i]``.
        collate: Makes a batch of a list of samples.
        micro_batch_size: Most samples in a micro-batch where the user does not say otherwise; None for all.
    """

    samples: Samples
    collate: Callable[[list[Any]], Any] = default_collate
    micro_batch_size: int | None = None

    def __len__(self) -> int:
        return len(self.samples)  # type: ignore[arg-type]


class Chosen(Dataset[Any]):
    """Some samples of a data set, which keep the random numbers of their places in it.

    Args:
        samples: The data set.
        numbers: The samples' places in it.
    """

    def __init__(self, samples: Samples, numbers: Sequence[int]) -> None:
        self._samples, self.numbers = samples, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Any:
        return self._samples[self.numbers[i]]


def as_data(given: Any) -> Data:
    """Data from what a user gives.

    Args:
        given: A tuple (or list) of tensors with one leading dimension; a map-style data set or list of samples; a DataLoader,
            of which samples, ``collate_fn`` and, for micro-batches, ``batch_size`` are taken; or another iterable of samples,
            such as an IterableDataset or a generator, which is read once and kept.

    Raises:
        UsageError: If it is none of these, or a loader that repeats samples, leaves some out or makes its own batches.
    """
    if isinstance(given, Data):
        return given
    if isinstance(given, DataLoader):
        return _of_loader(given)
    if isinstance(given, tuple) or (isinstance(given, list) and all(isinstance(t, Tensor) for t in given)):
        if not given or not all(isinstance(t, Tensor) and t.dim() and len(t) == len(given[0]) for t in given):
            found = ", ".join(str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in given)
            raise UsageError(
                f"data given as a tuple must be tensors with one leading dimension, the samples; got ({found})"
            )
        return Data(TensorDataset(*given))
    return Data(_by_index(given))


def some_of(given: Any, numbers: Sequence[int]) -> Data:
    """The samples of these numbers, batched as the whole is; arguments and errors as :func:`as_data`."""
    data = as_data(given)
    if type(data.samples) is TensorDataset:
        chosen = torch.as_tensor(numbers, dtype=torch.long)
        return dataclasses.replace(data, samples=TensorDataset(*(t[chosen] for t in data.samples.tensors)))
    return dataclasses.replace(data, samples=Chosen(data.samples, numbers))


def _of_loader(loader: DataLoader[Any]) -> Data:
    batching: Any = loader.batch_sampler
    if type(batching) is not BatchSampler:
        how = "batch_size=None" if batching is None else f"a {type(batching).__name__}"
        raise UsageError(
            f"the DataLoader makes its own batches, by {how}, and dhf cuts batches from samples; give the data set, or a "
            "DataLoader(dataset, batch_size=..., collate_fn=...)"
        )
    samples = _by_index(loader.dataset)
    if not isinstance(loader.dataset, IterableDataset):
        _check_sampler(batching.sampler, len(samples))
    left = len(samples) % batching.batch_size if batching.drop_last else 0
    if left:
        raise UsageError(
            f"the DataLoader's drop_last=True leaves out {left} of {len(samples)} samples, and dhf takes all of them, in uneven "
            "batches; give drop_last=False"
        )
    return Data(samples, loader.collate_fn or default_collate, batching.batch_size)


def _check_sampler(sampler: Any, samples: int) -> None:
    """Refuse a sampler that does not take every sample once; any order is as good as another."""
    if isinstance(sampler, DistributedSampler):
        raise UsageError(
            "the DataLoader has a DistributedSampler, and dhf divides the samples over ranks itself, without repeating any; "
            "give DataLoader(dataset) without a sampler"
        )
    once = isinstance(sampler, SequentialSampler) or (
        isinstance(sampler, RandomSampler) and not sampler.replacement and sampler.num_samples == samples
    )
    if not once:
        raise UsageError(
            f"the DataLoader has a {type(sampler).__name__}, which may repeat samples or leave some out; give the samples that "
            "count, as torch.utils.data.Subset(dataset, indices), and weights in your objective's loss"
        )


def _by_index(given: Any) -> Any:
    """The same, or what an iterable holds, as something with len() and []."""
    iterable = isinstance(given, IterableDataset)
    if not iterable and hasattr(given, "__len__") and hasattr(given, "__getitem__"):
        if isinstance(given, (str, bytes, Mapping)):
            raise UsageError(f"data must hold samples, and a {type(given).__name__} holds none; {_FORMS}")
        return given
    if not iterable and not isinstance(given, Iterable):
        raise UsageError(f"data must be samples, got {type(given).__name__}; {_FORMS}")
    return _read(given)


_FORMS = "give a tuple of tensors, a map-style data set (with len() and []), a DataLoader or an iterable of samples"


def _read(samples: Iterable[Any]) -> list[Any]:
    """All samples of an iterable. One without an end is told by the memory it would take."""
    kept: list[Any] = []
    nbytes, limit = 0, available_memory(torch.device("cpu")) / 2
    for sample in samples:
        kept.append(sample)
        nbytes += max(_LEAST_BYTES, _nbytes(sample))
        if len(kept) % _LOOK_EVERY == 0 and nbytes > limit:
            raise UsageError(
                f"the iterable has given {len(kept):,} samples, {bytes_in_words(nbytes)}, and goes on; an iterable is read once "
                "and kept in memory: give a map-style data set, or itertools.islice(samples, number)"
            )
    return kept


def _nbytes(part: Any) -> int:
    if isinstance(part, (Tensor, np.ndarray)):
        return part.nbytes
    parts = part.values() if isinstance(part, Mapping) else part if isinstance(part, (tuple, list)) else ()
    return sum(map(_nbytes, parts))
