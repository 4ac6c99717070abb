"""Retention: which micro-batches keep their graphs for a whole solve, and which have them rebuilt for each product.

    all     every graph is kept
    none    none is
    SIZE    as many as fit into so many bytes, with what a product itself takes
    auto    as many as fit into a share of the memory that is available when the first graph has been measured

What a micro-batch's graph takes is measured once, on the first one, and the others' by the numbers that their data hold. Where
memory runs out nevertheless, less is kept from then on. Kept or rebuilt, a product is the same.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dhf.byte_size import parse_bytes
from dhf.errors import UsageError
from dhf.memory import available_memory
from dhf.objective import Objective
from dhf.parameters import Parameters

__all__ = ["RETAIN", "Retention", "Storages", "check_retain", "counting", "size_of"]

RETAIN = ("all", "none", "auto")
_SHARE = 0.6  # of the memory that is available
# Of the largest micro-batch's graph, measured by resident memory on a deep autoencoder:
_PRODUCT = 1.0  # what a product takes besides the graph
_REBUILT = 2.0  # what a rebuilt graph and its product take
_VECTORS = 4  # flat vectors that a product holds with either


def check_retain(retain: object) -> str | int:
    """``"all"``, ``"none"``, ``"auto"``, or a number of bytes.

    Raises:
        UsageError: If it is none of them.
    """
    if isinstance(retain, int) and not isinstance(retain, bool) and retain >= 0:
        return retain
    if isinstance(retain, str):
        if retain in RETAIN:
            return retain
        size = parse_bytes(retain)
        if size is not None:
            return size
    raise UsageError(f"retain {retain!r} is unknown; give all, none, auto, or a size such as 2GiB or 500MB")


class Retention:
    """The memory policy of one rank; it outlives operators, and remembers what has been measured.

    Args:
        retain: ``"all"``, ``"none"``, ``"auto"``, bytes, or a size such as ``"2GiB"``.
        sharers: Processes that share the device's memory; for ``"auto"``.

    Attributes:
        policy: What was asked for: one of RETAIN, or bytes.
        budget: Bytes for graphs and what a product takes; None while it is not known, infinity for no limit.
        rate: Measured bytes of graph for each number of a micro-batch's data; None before that.
        forward_mode: Whether rebuilt products carry derivatives forward; None before that has been tried.

    Raises:
        UsageError: If ``retain`` is unknown.
    """

    def __init__(self, retain: str | int = "auto", *, sharers: int = 1) -> None:
        self.policy = check_retain(retain)
        self.budget: float | None = {"all": math.inf, "none": 0.0, "auto": None}.get(self.policy, self.policy)  # type: ignore
        self.rate: float | None = None
        self.forward_mode: bool | None = None
        self._sharers = max(1, sharers)
        self._vectors = 0
        self._most = math.inf  # numbers that may be kept since memory has run out

    def wants_measuring(self, sizes: Sequence[int]) -> bool:
        """Whether the graph of the first of these micro-batches is to be measured; never without need."""
        if self.rate is not None or self.policy in ("all", "none") or not sizes:
            return False
        # a lone micro-batch takes as much when it is rebuilt
        return self.policy != "auto" or len(sizes) > 1

    def look(self, parameters: Parameters, sizes: Sequence[int]) -> None:
        """Settle what ``"auto"`` may take, before the first graph is built; a lone micro-batch needs no look."""
        self._vectors = _VECTORS * parameters.numel * parameters.dtype.itemsize
        if len(sizes) > 1:
            self.settle(parameters.device)

    def settle(self, device: torch.device) -> float:
        """The budget; that of ``"auto"`` by what is available now, if it is not known yet."""
        if self.budget is None:
            self.budget = _SHARE * available_memory(device) / self._sharers
        return self.budget

    def measured(self, size: int, nbytes: int) -> None:
        """The graph of a micro-batch of this size takes so many bytes."""
        self.rate = nbytes / max(size, 1)

    def room(self, sizes: Sequence[int]) -> float:
        """How many numbers of data may have their graphs kept, of a shard whose micro-batches hold so many."""
        if self.budget is None or self.budget == math.inf or not sizes:
            return self._most
        if self.budget == 0:
            return 0.0
        if self.rate is None:
            return self._most
        largest, whole = max(sizes) * self.rate, sum(sizes) * self.rate
        if whole + _PRODUCT * largest + self._vectors <= self.budget:
            return self._most
        return min(self._most, max(0.0, self.budget - _REBUILT * largest - self._vectors) / max(self.rate, 1e-300))

    def peak(self, sizes: Sequence[int]) -> tuple[int, float]:
        """How many of these micro-batches have their graphs kept, and the bytes that graphs and a product take at most."""
        room, kept, count = self.room(sizes), 0, 0
        for size in sizes:
            if kept + size <= room:
                kept, count = kept + size, count + 1
        rate, largest = self.rate or 0.0, max(sizes, default=0)
        return count, rate * (kept + largest * (_PRODUCT if count == len(sizes) else _REBUILT)) + self._vectors

    def shrink(self, kept: int) -> None:
        """Memory has run out: keep no more than so many numbers' graphs from now on."""
        self._most = min(self._most, kept)


class Storages:
    """The distinct storages that graphs keep alive, those of some tensors left out."""

    def __init__(self, apart: Iterator[Tensor]) -> None:
        self._apart = {t.untyped_storage().data_ptr() for t in apart}
        self._seen: dict[int, int] = {}

    def note(self, tensor: Tensor) -> Tensor:
        """Count a tensor's storage."""
        if tensor._is_zerotensor():  # zeros such as the slope of a weight in forward mode, which take no memory
            return tensor
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._apart:
            self._seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    def hold(self, graph: Any) -> None:
        """Count what a graph keeps as attributes of its own, its gradient left out, which is not kept."""
        for tensor in _tensors({name: value for name, value in vars(graph).items() if name != "gradient"}):
            self.note(tensor)

    @property
    def nbytes(self) -> int:
        """Their bytes."""
        return sum(self._seen.values())


@contextlib.contextmanager
def counting(objective: Objective, batch: Any) -> Iterator[Storages]:
    """Count what graphs built inside keep alive, parameters and the batch's own tensors left out."""

    def apart() -> Iterator[Tensor]:
        yield from objective.module.parameters()
        yield from _tensors(batch)

    storages = Storages(apart())
    with torch.autograd.graph.saved_tensors_hooks(storages.note, lambda tensor: tensor):
        yield storages


def size_of(batch: Any) -> int:
    """Numbers that a batch holds, by which the graphs of its kind are compared."""
    return sum(t.numel() for t in _tensors(batch)) or 1


def _tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors in a nest of containers and graphs."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from _tensors(part)
    elif isinstance(batch, (tuple, list)):
        for part in batch:
            yield from _tensors(part)
    elif hasattr(batch, "product"):  # a graph within a graph
        yield from _tensors(vars(batch))
    elif getattr(batch, "__closure__", None):  # an output Hessian
        yield from _tensors([cell.cell_contents for cell in batch.__closure__])
