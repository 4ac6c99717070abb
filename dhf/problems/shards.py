"""Shard: this rank's samples of each step, as micro-batches; nothing is padded, repeated or left out.

The samples of a step have one order, the same whatever the number of ranks; rank r takes the r-th of ``size``
contiguous parts of it. Which samples a step takes depends on the seed and the step alone, so a resumed run goes on with
the right ones, also with another number of ranks. A data set whose samples are drawn at random (augmentation) is drawn anew
for each step of a mini-batch run, and once for a run that takes all samples in each step; by seed, step and sample, so that
ranks and resumed runs draw alike. It must draw from the global generators of torch, numpy or Python for that.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

from dhf.comm import Communicator
from dhf.digest import digest
from dhf.errors import UsageError
from dhf.evaluation import stream_seed
from dhf.problems.data import Chosen, Samples, as_data

__all__ = ["Shard", "shard"]

_HASHED_BYTES = 64 * 2**20


class Shard:
    """The micro-batches of one rank.

    Args:
        data: What :func:`dhf.problems.data.as_data` takes: tensors, a data set, a DataLoader or an iterable of samples.
        rank: This rank.
        size: Number of ranks.
        device: Where batches go.
        dtype: What their floating-point tensors become; None leaves them as they are.
        batch_size: Samples per step over all ranks; None for all of them. The last batch of an epoch may be smaller.
        micro_batch_size: Most samples in a micro-batch; None for the batch size of a DataLoader, and for one micro-batch per
            rank and step otherwise.
        seed: Names the order of the epochs.

    Raises:
        UsageError: If the data cannot be used or are empty, or a size is out of range.
    """

    def __init__(
        self,
        data: Any,
        rank: int,
        size: int,
        *,
        device: torch.device,
        dtype: torch.dtype | None,
        batch_size: int | None = None,
        micro_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        found = as_data(data)
        self._data, self._collate, self.samples = found.samples, found.collate, len(found)
        if self.samples == 0:
            raise UsageError("the data set is empty")
        for name, value in (("batch-size", batch_size), ("micro-batch-size", micro_batch_size)):
            if value is not None and value < 1:
                raise UsageError(f"--{name} must be at least 1, got {value}")
        self._rank, self._size, self._device, self._dtype = rank, size, device, dtype
        self._batch = self.samples if batch_size is None else min(batch_size, self.samples)
        self._micro, self._seed = micro_batch_size or found.micro_batch_size, seed
        self._whole: list[Any] | None = None

    @property
    def batch_size(self) -> int:
        """Samples per step over all ranks."""
        return self._batch

    def sizes(self) -> list[int]:
        """Samples per rank in a full batch."""
        return [len(part) for part in np.array_split(np.arange(self._batch), self._size)]

    def facts(self) -> dict[str, str]:
        """What must be the same of the data on all ranks: their number, form and content, the last as a hash.

        Tensors are hashed whole up to 64 MiB and by rows at even distances above; of a data set, 64 samples at even distances.

        Raises:
            UsageError: If a sample is another one each time it is read.
        """
        self._check_repeatable()
        return {
            "samples": str(self.samples),
            "form": _form(_samples(self._data, [0], 0, 0)[0]),
            "content": _content(self._data, self.samples),
        }

    def place(self, step: int, rank: int, micro_batch: int, row: int) -> int:
        """The index in the data set of a sample of a rank's micro-batches."""
        order = np.arange(self.samples) if self._batch == self.samples else self._order(step)
        return int(np.array_split(order, self._size)[rank][micro_batch * (self._micro or 0) + row])

    def batches(self, step: int) -> list[Any]:
        """This rank's micro-batches of a step, on its device.

        Raises:
            UsageError: If a sample holds NaN or infinity; it names the sample.
        """
        if self._batch < self.samples:
            return self._fetch(self._order(step), step)
        if self._whole is None:
            self._whole = self._fetch(np.arange(self.samples), 0)
        return self._whole

    def first(self, step: int, number: int) -> Any | None:
        """The first samples of this rank's part of a step, at most so many, as one micro-batch; None if it has none."""
        whole = self._batch == self.samples
        order = np.arange(self.samples) if whole else self._order(step)
        mine = np.array_split(order, self._size)[self._rank][:number]
        return self._batch_of(mine, 0 if whole else step) if len(mine) else None

    def _check_repeatable(self) -> None:
        if type(self._data) is TensorDataset:
            return
        first, again = (digest(_samples(self._data, [0], 0, 0)) for _ in range(2))
        if first != again:
            raise UsageError(
                "sample 0 of the data is another one each time it is read, so that ranks and steps would not see the same data; "
                "draw from the global generators of torch, numpy or random, which dhf seeds for each sample"
            )

    def _order(self, step: int) -> np.ndarray:
        per_epoch = -(-self.samples // self._batch)
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([self._seed, epoch]).permutation(self.samples)
        return order[place * self._batch : (place + 1) * self._batch]

    def _fetch(self, order: np.ndarray, draw: int) -> list[Any]:
        mine = np.array_split(order, self._size)[self._rank]
        size = self._micro or max(1, len(mine))
        return [self._batch_of(mine[i : i + size], draw) for i in range(0, len(mine), size)]

    def _batch_of(self, indices: np.ndarray, draw: int) -> Any:
        if type(self._data) is TensorDataset and self._collate is default_collate:
            batch: Any = tuple(t[torch.from_numpy(indices)] for t in self._data.tensors)
        else:
            batch = self._collate(_samples(self._data, indices, self._seed, draw))
        return self._place(batch, indices)

    def _place(self, part: Any, indices: np.ndarray) -> Any:
        if isinstance(part, Tensor):
            if not part.is_floating_point():
                return part.to(self._device)
            _check_finite(part, indices)
            return part.to(self._device, self._dtype or part.dtype)
        if isinstance(part, Mapping):
            return {key: self._place(value, indices) for key, value in part.items()}
        if isinstance(part, tuple) and hasattr(part, "_fields"):
            return type(part)(*(self._place(value, indices) for value in part))
        if isinstance(part, (tuple, list)):
            return tuple(self._place(value, indices) for value in part)
        return part


def shard(
    data: Any,
    comm: Communicator | None = None,
    *,
    step: int = 0,
    batch_size: int | None = None,
    micro_batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> list[Any]:
    """This rank's micro-batches of a step: its part of all samples, or of those of a mini-batch.

    Nothing is padded, repeated or left out: over all ranks, every sample of the step is there once, in the data's order or, with
    ``batch_size``, in one that ``seed`` names.

    Args:
        data: A tuple of tensors with one leading dimension, a map-style data set, a DataLoader (its samples, collate_fn and
            batch size; it is dhf that divides and orders), or another iterable of samples, which is read whole.
        comm: How ranks talk; one process by default. Batches go to its device.
        step: Which mini-batch.
        batch_size: Samples per step over all ranks; all of them by default.
        micro_batch_size: Most samples in a micro-batch; by default the loader's batch size, or this rank's whole part.
        dtype: What floating-point tensors become; as they are by default.
        seed: Names the order of mini-batches; the same on all ranks.

    Raises:
        UsageError: If the data cannot be used or are empty, or a size is out of range.

    Example:
        >>> x = torch.arange(5.0)
        >>> [batch for (batch,) in shard((x,), micro_batch_size=2)]
        [tensor([0., 1.]), tensor([2., 3.]), tensor([4.])]
    """
    rank, size, device = (comm.rank, comm.size, comm.device) if comm is not None else (0, 1, torch.device("cpu"))
    mine = Shard(
        data,
        rank,
        size,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        seed=seed,
    )
    mine._check_repeatable()
    return mine.batches(step)


def _form(sample: Any) -> str:
    """Dtypes and shapes of one sample."""
    if isinstance(sample, (Tensor, np.ndarray)):
        return f"{str(sample.dtype).removeprefix('torch.')}{tuple(sample.shape)}"
    if isinstance(sample, Mapping):
        return "{" + ", ".join(f"{key}: {_form(value)}" for key, value in sample.items()) + "}"
    if isinstance(sample, (tuple, list)):
        return "(" + ", ".join(map(_form, sample)) + ")"
    return type(sample).__name__


def _content(data: Samples, samples: int) -> str:
    if type(data) is TensorDataset:
        size = sum(t.nbytes for t in data.tensors)
        stride = -(-size // _HASHED_BYTES)
        return digest([t[::stride] for t in data.tensors])
    chosen = sorted({round(i) for i in np.linspace(0, samples - 1, 64)})
    return digest(_samples(data, chosen, 0, 0))


def _samples(data: Samples, indices: Iterable[int], seed: int, draw: int) -> list[Any]:
    """Samples of a data set; what they draw at random depends on the seed, the drawing and their index alone."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    found = []
    try:
        with torch.random.fork_rng(devices=[]):
            for i in map(int, indices):
                own = stream_seed(seed, draw, data.numbers[i] if isinstance(data, Chosen) else i)
                random.seed(own)
                np.random.seed(own & 0xFFFFFFFF)  # noqa: NPY002
                torch.random.default_generator.manual_seed(own)
                found.append(data[i])
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
    return found


def _check_finite(values: Tensor, indices: np.ndarray) -> None:
    finite = torch.isfinite(values).flatten(1).all(1) if values.dim() > 1 else torch.isfinite(values)
    if not finite.dim() or finite.all():
        return
    wrong = int((~finite).nonzero()[0])
    # a collate_fn may have made something else of the samples than one row of each
    where = (
        f"sample {indices[wrong]}" if len(finite) == len(indices) else f"one of samples {indices[0]} to {indices[-1]}"
    )
    raise UsageError(f"{where} of the data holds NaN or infinity; remove it or mend it")
