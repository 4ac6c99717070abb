"""Mpi: ranks that talk through MPI, by mpi4py.

MPI knows no timeouts, and a rank that leaves alone lets the others wait for ever. So every collective is started without
blocking and asked for until it is done or the timeout has passed; and a rank that must leave alone aborts the job.
Asking gives the core away each time, so that ranks that share cores do not keep one another from working.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dhf.comm.communicator import Done, Pending, lost
from dhf.errors import CommunicationError, UsageError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Mpi", "check_size", "load"]

_ROLL_CALL = 3.0  # seconds; ranks that wait in the same collective have all noticed by then
_ROLL_CALL_TAG = 1
_EAGER = 0.005  # seconds for which a wait only yields, before it sleeps between looks
_NAP = 5e-5
_HALF = (torch.bfloat16, torch.float16)  # MPI has no sum of these
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


class Mpi:
    """A Communicator over a duplicate of MPI's world, whose messages no others can meet.

    CPU tensors are handed to MPI as they lie; GPU tensors too where the MPI library says that it reads GPU memory, and through
    pinned memory elsewhere. bfloat16 and float16 are summed as float32, and rounded once.

    Until it is closed, an uncaught exception on this rank ends the whole job, with the traceback and exit code 1; and a rank
    that ends without :meth:`close` ends the others once they have waited for the timeout.

    Args:
        device: Where this rank's tensors live.
        timeout: Seconds after which a collective that some rank has not joined is an error.
        attempt: How often the scheduler has started this job again.

    Raises:
        UsageError: If mpi4py or an MPI library is missing, or the size is not what the launcher started.
    """

    notices = False

    def __init__(self, device: torch.device, *, timeout: float = 300.0, attempt: int = 0) -> None:
        mpi = load()
        world = mpi.COMM_WORLD
        check_size(world.Get_size(), os.environ)
        self._mpi = mpi
        self._comm, self._calls = _duplicates(world)
        self.rank, self.size = world.Get_rank(), world.Get_size()
        self.device, self.backend, self.attempt = device, "mpi", attempt
        self.collectives = 0
        self.local_rank, self.local_size = _place_on_host(mpi, self._comm)
        self._timeout = timeout
        self._direct = device.type == "cpu" or _reads_gpu_memory(mpi)
        self._staging: dict[tuple[torch.dtype, int], Tensor] = {}
        self._lost: CommunicationError | None = None
        self._closed = False
        self._hook = sys.excepthook
        sys.excepthook = self._on_uncaught
        atexit.register(self._on_exit)

    def all_reduce(self, buffer: Tensor) -> None:
        """Sum over the ranks in place; see :class:`Communicator`."""
        self.collectives += 1
        with self._as_mpi_takes_it(buffer) as b:
            self._call("all-reduce", lambda: self._comm.Iallreduce(self._mpi.IN_PLACE, b))

    def start_all_reduce(self, buffer: Tensor) -> Pending:
        """Sum at once: MPI libraries make no progress while nobody asks, so there is nothing to gain by starting early."""
        self.all_reduce(buffer)
        return Done()

    def reduce_scatter(self, buffer: Tensor, out: Tensor) -> None:
        """This rank's piece of the sum; see :class:`Communicator`."""
        self.collectives += 1
        with self._as_mpi_takes_it(buffer) as b, self._as_mpi_takes_it(out) as mine:
            self._call("reduce-scatter", lambda: self._comm.Ireduce_scatter_block(b, mine))

    def all_gather(self, piece: Tensor, out: Tensor) -> None:
        """Every rank's piece, in rank order; see :class:`Communicator`."""
        self.collectives += 1
        with self._as_mpi_takes_it(piece) as mine, self._as_mpi_takes_it(out) as b:
            self._call("all-gather", lambda: self._comm.Iallgather(mine, b))

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """Overwrite with the buffer of rank ``source``."""
        self.collectives += 1
        with self._as_mpi_takes_it(buffer) as b:
            self._call("broadcast", lambda: self._comm.Ibcast(b, root=source))

    def gather_objects(self, value: Any) -> list[Any]:
        """One picklable value per rank, on every rank."""
        pickled = self._mpi.pickle.dumps(value)
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(pickled)
        self._call("object gather", lambda: self._comm.Iallreduce(self._mpi.IN_PLACE, sizes.numpy()))
        counts = sizes.tolist()
        everything = bytearray(sum(counts))
        self._call("object gather", lambda: self._comm.Iallgatherv(pickled, [everything, counts, self._mpi.BYTE]))
        ends = [sum(counts[: r + 1]) for r in range(self.size)]
        parts = (bytes(everything[end - count : end]) for end, count in zip(ends, counts, strict=True))
        return [self._mpi.pickle.loads(part) for part in parts]

    def barrier(self, timeout: float | None = None) -> None:
        """Wait for every rank; the error names those that did not come within ``timeout`` seconds."""
        self._call("barrier", self._comm.Ibarrier, timeout)

    def remember(self, name: str, value: str) -> str:
        """The value itself: MPI launchers start no rank again. See :class:`Communicator`."""
        return value

    def close(self) -> None:
        """Take back what was hooked; MPI itself is finalised when the process ends, together with the other ranks."""
        if self._closed or self._lost is not None:  # MPI would wait for the lost ranks as this process ends
            return
        self._closed = True
        if sys.excepthook == self._on_uncaught:
            sys.excepthook = self._hook
        atexit.unregister(self._on_exit)
        self._staging.clear()

    def abandon(self, code: int, patience: float = 0.0) -> None:
        """End the job on all ranks with this exit code, ``patience`` seconds from now if no other has done so by then."""
        _flush()
        time.sleep(patience)
        self._mpi.COMM_WORLD.Abort(code)

    @contextlib.contextmanager
    def _as_mpi_takes_it(self, buffer: Tensor) -> Any:
        """The tensor for MPI: itself, or a copy that is copied back."""
        if not buffer.is_contiguous():
            raise ValueError("a collective needs a contiguous tensor")
        plain = buffer.detach()
        taken = self._staged(plain)
        if taken.device.type != "cpu":
            torch.cuda.current_stream(taken.device).synchronize()  # MPI knows nothing of streams
        yield taken
        if taken is not plain:
            plain.copy_(taken)

    def _staged(self, plain: Tensor) -> Tensor:
        direct = self._direct or plain.device.type == "cpu"
        if plain.dtype in _HALF:
            return plain.float() if direct else plain.float().cpu()
        if direct:
            return plain
        key = plain.dtype, plain.numel()
        if key not in self._staging:
            self._staging[key] = torch.empty(plain.shape, dtype=plain.dtype, pin_memory=True)
        return self._staging[key].view(plain.shape).copy_(plain)

    def _call(self, what: str, start: Callable[[], MPI.Request], timeout: float | None = None) -> None:
        """Start it, and wait until it is done; the error says who is missing, and no further work is then started."""
        if self._lost is not None:
            raise self._lost
        request = start()
        limit = self._timeout if timeout is None else timeout
        cause = ""
        try:
            if self._is_done(request, limit):
                return
        except self._mpi.Exception as error:
            cause = str(error).splitlines()[0]
        fate = cause or f"stopped, or busy for longer than the timeout of {limit:g} s"
        self._lost = lost(what, fate, fate, self._roll_call(), self.size)
        raise self._lost

    def _is_done(self, request: MPI.Request, limit: float, *, heeds_calls: bool = True) -> bool:
        """Whether the request is done within ``limit`` seconds, and before a call to the roll where this rank heeds one."""
        began = time.monotonic()
        while not request.Test():
            waited = time.monotonic() - began
            if waited < _EAGER:
                _yield_core()
            elif waited > limit or (heeds_calls and self._calls.Iprobe(self._mpi.ANY_SOURCE, _ROLL_CALL_TAG)):
                return False
            else:
                time.sleep(_NAP)
        return True

    def _roll_call(self) -> list[int]:
        """The ranks that have noticed as well, this one included."""
        here = {self.rank}
        with contextlib.suppress(self._mpi.Exception):
            word = bytearray(1)
            sent = [self._calls.Isend(word, r, _ROLL_CALL_TAG) for r in range(self.size) if r != self.rank]
            end = time.monotonic() + _ROLL_CALL
            status = self._mpi.Status()
            while len(here) < self.size and time.monotonic() < end:
                if self._calls.Iprobe(self._mpi.ANY_SOURCE, _ROLL_CALL_TAG, status):
                    self._calls.Recv(bytearray(1), status.Get_source(), _ROLL_CALL_TAG)
                    here.add(status.Get_source())
                else:
                    time.sleep(0.01)
            self._unanswered = sent  # kept, since a message's buffer must outlive it
        return sorted(here)

    def _on_uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        self._hook(kind, error, trace)
        print(f"error: rank {self.rank} of {self.size} ends the job: {kind.__name__}: {error}", file=sys.stderr)
        self.abandon(1)

    def _on_exit(self) -> None:
        """This rank ends without having closed: the others may end as well, or wait, and then name it."""
        if self._lost is None:
            with contextlib.suppress(self._mpi.Exception):
                # not among the collectives: MPI would take it for whichever of them the others are in, with wrong sums
                barrier = self._calls.Ibarrier()
                if self._is_done(barrier, self._timeout + 2 * _ROLL_CALL, heeds_calls=False):
                    return
            print(f"error: rank {self.rank} of {self.size} has ended while others go on", file=sys.stderr)
        self.abandon(5)


_made: list[Any] = []


def _duplicates(world: Any) -> tuple[Any, Any]:
    """Two duplicates of the world, made once for all communicators of this process: for collectives, and for the rest."""
    if not _made:
        _made.extend((world.Dup(), world.Dup()))
    return _made[0], _made[1]


def load() -> Any:
    """mpi4py's MPI, initialised.

    Raises:
        UsageError: If mpi4py, or an MPI library that it can use, is missing.
    """
    if any(name.startswith("OMPI_") for name in os.environ):
        os.environ.setdefault("MPI4PY_MPIABI", "openmpi")  # mpi4py's wheel cannot tell which MPI has started it
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        if getattr(error, "name", None) == "mpi4py":
            raise UsageError("--backend mpi needs mpi4py: pip install 'dhf[mpi]'") from None
        words = ": ".join(str(error).splitlines())
        raise UsageError(f"mpi4py found no MPI library: {words}; install mpich or Open MPI") from None
    return MPI


def check_size(size: int, environment: Mapping[str, str]) -> None:
    """Raise UsageError where MPI's world has not the size that the launcher started."""
    name = next((name for name in _SIZES if environment.get(name, "").isdigit()), None)
    if name is None or int(environment[name]) == size:
        return
    count = int(environment[name])
    hint = (
        "start with srun --mpi=pmi2 (or pmix), as `srun --mpi=list` allows"
        if name.startswith("SLURM")
        else "use the mpirun of the MPI library that mpi4py uses: python -m mpi4py --mpi-lib-version tells"
    )
    raise UsageError(
        f"the launcher started {count} processes ({name}={count}), but MPI's world has size {size} in each, so they would run "
        f"as {count // size if size else count} separate jobs; {hint}"
    )


def _place_on_host(mpi: Any, comm: MPI.Comm) -> tuple[int, int]:
    here = comm.Split_type(mpi.COMM_TYPE_SHARED, key=comm.Get_rank())
    place = here.Get_rank(), here.Get_size()
    here.Free()
    return place


def _reads_gpu_memory(mpi: Any) -> bool:
    """Whether the MPI library says that it takes GPU addresses."""
    if os.environ.get("MPICH_GPU_SUPPORT_ENABLED") == "1":
        return True
    for library in (None, mpi.__file__, "libmpi.so.40", "libmpi.so.12"):
        with contextlib.suppress(OSError, AttributeError):
            ask = ctypes.CDLL(library).MPIX_Query_cuda_support
            return bool(ask())
    return False


def _yield_core() -> None:
    if hasattr(os, "sched_yield"):
        os.sched_yield()
    else:
        time.sleep(0)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
