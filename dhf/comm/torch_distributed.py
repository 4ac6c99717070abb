"""TorchDistributed: ranks that talk through torch.distributed, NCCL for GPU tensors and gloo for the rest."""

from __future__ import annotations

import contextlib
import datetime
import queue
import re
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dhf.comm.communicator import Pending, lost
from dhf.errors import CommunicationError

__all__ = ["TorchDistributed"]

T = TypeVar("T")

# under their names of torch 2.13, and those of before
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_ROLL_CALL = 3.0  # seconds; who still runs has noticed by then, since the first to notice closes its connections


class TorchDistributed:
    """A Communicator over process groups of its own, apart from any group that the user has.

    Objects and barriers always go over gloo, so that a broken GPU link can still be reported. Several of these may
    live in one process. torch's default group is set up if there is none, and taken down by the last one to close.

    After a failed collective this rank closes its connections, so that no other waits for it, and answers a roll-call in
    the ranks' store; who does not answer is named in the error, and the communicator refuses all further work.

    Args:
        device: Where this rank's tensors live.
        backend: ``"nccl"`` (needs a CUDA device per rank) or ``"gloo"``.
        store: The key-value store the ranks meet at; None where torch's default group exists already.
        rank: This rank.
        size: Number of ranks.
        timeout: Seconds after which a collective that some rank has not joined is an error.
        launch_store: A store that outlives a restart of the ranks by their launcher; for :meth:`remember`.
        attempt: How often the launcher has restarted the ranks.

    Raises:
        CommunicationError: If not all ranks come within the timeout.
    """

    notices = True
    _open = _made = 0
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
        launch_store: dist.Store | None = None,
        attempt: int = 0,
    ) -> None:
        self.device, self.backend, self.attempt = device, backend, attempt
        self.rank, self.size = rank, size
        self.collectives = 0
        self._timeout = datetime.timedelta(seconds=timeout)
        self._store, self._launch_store = store, launch_store
        self._lost: CommunicationError | None = None
        self._groups: list[dist.ProcessGroup] = []
        TorchDistributed._made += 1
        self._name = f"dhf/communicator{TorchDistributed._made}"  # every rank makes them in one order
        self._call(f"joining {size} ranks", self._join)
        TorchDistributed._open += 1
        self._closed = False

    def _join(self) -> None:
        if not dist.is_initialized():
            dist.init_process_group(
                "gloo", store=self._store, rank=self.rank, world_size=self.size, timeout=self._timeout
            )
            TorchDistributed._owns_default = True
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._control = dist.new_group(backend="gloo", timeout=self._timeout)
        self._data = (
            self._control
            if self.backend == "gloo"
            else dist.new_group(backend=self.backend, timeout=self._timeout, device_id=self.device)
        )
        self._groups = list({id(group): group for group in (self._control, self._data)}.values())

    def all_reduce(self, buffer: Tensor) -> None:
        """Sum over the ranks in place; see :class:`Communicator`."""
        self.collectives += 1
        self._call("all-reduce", lambda: dist.all_reduce(buffer, group=self._group(buffer)))

    def start_all_reduce(self, buffer: Tensor) -> Pending:
        """As :meth:`all_reduce`, without waiting; gloo's threads or NCCL's stream go on with it."""
        self.collectives += 1
        started = self._call("all-reduce", lambda: dist.all_reduce(buffer, group=self._group(buffer), async_op=True))
        return _Started(lambda: self._call("all-reduce", started.wait))

    def reduce_scatter(self, buffer: Tensor, out: Tensor) -> None:
        """This rank's piece of the sum; see :class:`Communicator`."""
        self.collectives += 1
        group = self._group(buffer)
        self._call("reduce-scatter", lambda: _reduce_scatter(out, buffer, group=group))

    def all_gather(self, piece: Tensor, out: Tensor) -> None:
        """Every rank's piece, in rank order; see :class:`Communicator`."""
        self.collectives += 1
        self._call("all-gather", lambda: _all_gather(out, piece, group=self._group(piece)))

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """Overwrite with the buffer of rank ``source``."""
        self.collectives += 1
        self._call("broadcast", lambda: dist.broadcast(buffer, group_src=source, group=self._group(buffer)))

    def gather_objects(self, value: Any) -> list[Any]:
        """One picklable value per rank, on every rank."""
        values: list[Any] = [None] * self.size
        self._call("object gather", lambda: dist.all_gather_object(values, value, group=self._control))
        return values

    def barrier(self, timeout: float | None = None) -> None:
        """Wait for every rank; the error names those that did not come within ``timeout`` seconds."""
        limit = self._timeout if timeout is None else datetime.timedelta(seconds=timeout)
        self._call("barrier", lambda: dist.monitored_barrier(self._control, timeout=limit, wait_all_ranks=True))

    def remember(self, name: str, value: str) -> str:
        """The value first given under this name in any attempt of this launch; see :class:`Communicator`."""
        if self._launch_store is None:
            return value
        store, key = self._launch_store, f"dhf/launch/{name}"
        return self._call("look-up in the launcher's store", lambda: store.compare_set(key, "", value)).decode()

    def abandon(self, code: int, patience: float = 0.0) -> None:
        """Closed connections tell the others; see :class:`Communicator`."""

    def close(self) -> None:
        """Destroy this communicator's groups, and torch's default group if dhf made it and nobody else uses it."""
        if self._closed:
            return
        self._closed = True
        TorchDistributed._open -= 1
        self._hang_up()
        if TorchDistributed._owns_default and TorchDistributed._open == 0 and dist.is_initialized():
            dist.destroy_process_group()
            TorchDistributed._owns_default = False

    def _group(self, buffer: Tensor) -> dist.ProcessGroup:
        return self._data if buffer.device.type == self.device.type else self._control

    def _hang_up(self) -> None:
        """Close this communicator's connections."""
        groups, self._groups = self._groups, []
        if dist.is_initialized():
            for group in groups:
                dist.destroy_process_group(group)
        self.__dict__.pop("_control", None)  # the sockets go with the last reference
        self.__dict__.pop("_data", None)

    def _call(self, what: str, call: Callable[[], T]) -> T:
        """Call into torch.distributed; its errors become a CommunicationError that says who is missing."""
        if self._lost is not None:
            raise self._lost
        try:
            return call()
        except (RuntimeError, dist.DistError) as error:
            cause = re.sub(r"^\[\S+\]\s*|\.? This is typically caused by.*", "", str(error).strip().splitlines()[0])
        # past the except clause, since the exception holds frames that hold the group whose sockets must close now
        self._hang_up()
        self._lost = self._describe(what, cause, self._roll_call())
        raise self._lost

    def _roll_call(self) -> list[int] | None:
        """The ranks that are still there, this one included; None if the store does not answer either."""
        if self._store is None and not dist.is_initialized():
            return None
        answer: queue.SimpleQueue[list[int] | None] = queue.SimpleQueue()
        # torch's store has no timeout for its answers: behind a link that is down it blocks while TCP repeats itself
        threading.Thread(target=lambda: answer.put(self._ask_store()), name="dhf-roll-call", daemon=True).start()
        with contextlib.suppress(queue.Empty):
            return answer.get(timeout=2 * _ROLL_CALL)
        return None

    def _ask_store(self) -> list[int] | None:
        try:
            store = self._store if self._store is not None else dist.distributed_c10d._get_default_store()
            store.set(f"{self._name}/here/{self.rank}", "")
            names = [f"{self._name}/here/{r}" for r in range(self.size)]
            end = time.monotonic() + _ROLL_CALL
            while True:
                here = [r for r, name in enumerate(names) if store.check([name])]
                if len(here) == self.size or time.monotonic() >= end:
                    return here
                time.sleep(0.02)
        except (RuntimeError, dist.DistError):
            return None

    def _describe(self, what: str, cause: str, here: list[int] | None) -> CommunicationError:
        if here is None:
            return CommunicationError(
                f"rank {self.rank} lost the others in {what}: {cause}; the launcher or a rank has died, or was busy for longer "
                f"than the timeout of {self._timeout.total_seconds():g} s"
            )
        fate = (
            "died"
            if re.search("closed|reset|refused", cause, re.IGNORECASE)
            else f"stopped, or busy for longer than the timeout of {self._timeout.total_seconds():g} s"
        )
        return lost(what, cause, f"{fate} ({cause})", here, self.size)


class _Started:
    """A collective under way, whose errors are told as those of any other."""

    def __init__(self, wait: Callable[[], object]) -> None:
        self._wait = wait

    def wait(self) -> None:
        """Return once it is done."""
        self._wait()
