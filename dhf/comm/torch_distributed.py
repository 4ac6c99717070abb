"""TorchDistributed: ranks that talk through torch.distributed, NCCL for GPU tensors and gloo for the rest."""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dhf.errors import CommunicationError

__all__ = ["TorchDistributed"]


class TorchDistributed:
    """A Communicator over process groups of its own, apart from any group that the user has.

    Objects and barriers always go over gloo, so that a broken GPU link can still be reported. Several of these may
    live in one process. torch's default group is set up if there is none, and taken down by the last one to close.

    Args:
        device: Where this rank's tensors live.
        backend: ``"nccl"`` (needs a CUDA device per rank) or ``"gloo"``.
        store: The key-value store the ranks meet at; None where torch's default group exists already.
        rank: This rank.
        size: Number of ranks.
        timeout: Seconds after which a collective that some rank has not joined is an error.

    Raises:
        CommunicationError: If not all ranks come within the timeout.
    """

    _open = 0
    _owns_default = False

    def __init__(
        self,
        device: torch.device,
        backend: str,
        *,
        store: dist.Store | None = None,
        rank: int = -1,
        size: int = -1,
        timeout: float = 300.0,
    ) -> None:
        self.device, self.backend = device, backend
        self.collectives = 0
        self._timeout = datetime.timedelta(seconds=timeout)
        with _named(f"joining {size} ranks", rank):
            if not dist.is_initialized():
                dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=self._timeout)
                TorchDistributed._owns_default = True
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self._control = dist.new_group(backend="gloo", timeout=self._timeout)
            self._data = (
                self._control
                if backend == "gloo"
                else dist.new_group(backend=backend, timeout=self._timeout, device_id=device)
            )
        TorchDistributed._open += 1
        self._closed = False

    def all_reduce(self, buffer: Tensor) -> None:
        """Sum over the ranks in place; see :class:`Communicator`."""
        self.collectives += 1
        with _named("all-reduce", self.rank):
            dist.all_reduce(buffer, group=self._group(buffer))

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """Overwrite with the buffer of rank ``source``."""
        self.collectives += 1
        with _named("broadcast", self.rank):
            dist.broadcast(buffer, group_src=source, group=self._group(buffer))

    def gather_objects(self, value: Any) -> list[Any]:
        """One picklable value per rank, on every rank."""
        values: list[Any] = [None] * self.size
        with _named("object gather", self.rank):
            dist.all_gather_object(values, value, group=self._control)
        return values

    def barrier(self, timeout: float | None = None) -> None:
        """Wait for every rank; the error names those that did not come within ``timeout`` seconds."""
        limit = self._timeout if timeout is None else datetime.timedelta(seconds=timeout)
        with _named("barrier", self.rank):
            dist.monitored_barrier(self._control, timeout=limit, wait_all_ranks=True)

    def close(self) -> None:
        """Destroy this communicator's groups, and torch's default group if dhf made it and nobody else uses it."""
        if self._closed:
            return
        self._closed = True
        TorchDistributed._open -= 1
        if not dist.is_initialized():
            return
        for group in {self._control, self._data}:
            dist.destroy_process_group(group)
        del self._control, self._data  # the sockets go with the last reference
        if TorchDistributed._owns_default and TorchDistributed._open == 0:
            dist.destroy_process_group()
            TorchDistributed._owns_default = False

    def _group(self, buffer: Tensor) -> dist.ProcessGroup:
        return self._data if buffer.device.type == self.device.type else self._control


@contextlib.contextmanager
def _named(what: str, rank: int) -> Iterator[None]:
    """Turn torch.distributed's errors into a CommunicationError that names the collective and this rank."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        cause = re.sub(r"^\[\S+\]\s*|\.? This is typically caused by.*", "", str(error).strip().splitlines()[0])
        raise CommunicationError(
            f"rank {rank} lost the others in {what}: {cause}; a rank has died, or was busy for longer than the timeout"
        ) from error
