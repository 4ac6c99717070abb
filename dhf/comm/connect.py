"""connect(): find out how this process was started, and join the ranks it belongs to."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from dhf.comm.interface import interface_of, is_loopback, route
from dhf.comm.launch import Launch, detect
from dhf.comm.mpi import Mpi, check_size, load
from dhf.comm.serial import Serial
from dhf.comm.torch_distributed import TorchDistributed
from dhf.errors import CommunicationError, RanksDifferError, UsageError
from dhf.version import __version__

if TYPE_CHECKING:
    from dhf.comm.communicator import Communicator

__all__ = ["connect"]

_BACKENDS = ("auto", "nccl", "gloo", "mpi", "serial")
_stores: dict[tuple[str, int, str], dist.Store] = {}
_connections = 0


def connect(
    backend: str = "auto", *, device: str = "auto", timeout: float = 300.0, threads: int | None = None
) -> Communicator:
    """Join the ranks that torchrun, srun or mpirun started, or be the only one.

    Args:
        backend: ``"auto"`` takes NCCL where every rank of this host has a GPU of its own, else MPI under mpirun and gloo under
            torchrun and srun, and serial for one process; or ``"nccl"``, ``"gloo"``, ``"mpi"``, ``"serial"``.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``. Rank r of a host takes GPU r (gloo ranks share GPUs if there are fewer).
        timeout: Seconds after which a rank that does not come, or leaves a collective waiting, is an error.
        threads: Intra-operation threads per rank; by default the cores this process may use, divided by the ranks
            on this host, when there are several.

    Returns:
        A Communicator; close it when done.

    Raises:
        UsageError: If the environment or the request contradicts itself.
        RanksDifferError: If the ranks run different versions of dhf or torch.
        CommunicationError: If the other ranks do not come in time.

    Example:
        >>> comm = connect("serial")
        >>> comm.rank, comm.size
        (0, 1)
    """
    if backend not in _BACKENDS:
        raise UsageError(f"backend {backend!r} is unknown; choose from {', '.join(_BACKENDS)}")
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device {device!r} is unknown; choose from auto, cpu, cuda")
    launch = _existing_group() or detect(os.environ)
    if launch.size > 1 and backend == "serial":
        raise UsageError(f"--backend serial is one process, but {launch.size} ranks were started; use --backend gloo")
    backend, place = _choose_together(launch, backend, device)
    if backend == "nccl":  # else its watchdog ends the process, and nobody says why
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    _set_threads(launch, threads)
    if backend == "serial":
        return Serial(place)
    comm: Communicator
    if backend == "mpi":
        comm = Mpi(place, timeout=timeout, attempt=int(launch.attempt))
        if comm.size == 1 and launch.launcher == "none":
            comm.close()
            raise UsageError("--backend mpi needs ranks: start with mpirun or srun --mpi=pmi2, or use --backend serial")
    elif dist.is_initialized():
        comm = TorchDistributed(place, backend, timeout=timeout)
    else:
        _stay_on_this_host(launch)
        base, store = _store(launch, timeout)
        _reach_other_hosts(launch, store)
        comm = TorchDistributed(
            place,
            backend,
            store=store,
            rank=launch.rank,
            size=launch.size,
            timeout=timeout,
            launch_store=base,
            attempt=int(launch.attempt),
        )
    try:
        check_versions(comm.gather_objects(_versions()))
    except BaseException:
        comm.close()
        raise
    return comm


def check_versions(found: Sequence[Mapping[str, str]]) -> None:
    """Raise RanksDifferError unless all ranks run the same dhf and torch; one mapping of name to version per rank."""
    for rank, versions in enumerate(found):
        for name, version in versions.items():
            if version != found[0].get(name):
                raise RanksDifferError(
                    rank,
                    f"rank {rank} runs {name} {version} and rank 0 {found[0].get(name)}; install one version on every host",
                )


def _versions() -> dict[str, str]:
    return {"dhf": __version__, "torch": torch.__version__}


def _existing_group() -> Launch | None:
    """The ranks of a default group that the user has opened already, however they were started."""
    if not dist.is_initialized():
        return None
    rank, size = dist.get_rank(), dist.get_world_size()
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", rank)))
    return Launch("torch.distributed", rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", size)))


def _choose_together(launch: Launch, backend: str, device: str) -> tuple[str, torch.device]:
    """As :func:`_choose`; where MPI connects the ranks, what one refuses is told to all, which would wait for it for ever."""
    try:
        chosen, refusal = _choose(launch, backend, device), ""
    except UsageError as error:
        chosen, refusal = None, str(error)
    by_mpi = backend == "mpi" or (backend == "auto" and launch.launcher == "mpirun")
    if by_mpi and launch.launcher in ("mpirun", "slurm"):
        world = load().COMM_WORLD
        check_size(world.Get_size(), os.environ)
        found = world.allgather(refusal)
        refusal = refusal or next((f"rank {rank}: {words}" for rank, words in enumerate(found) if words), "")
    if chosen is None or refusal:
        raise UsageError(refusal)
    return chosen


def _choose(launch: Launch, backend: str, device: str) -> tuple[str, torch.device]:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and gpus == 0:
        raise UsageError("--device cuda needs a GPU that torch can use: found none; use --device cpu")
    if backend == "nccl" and (device == "cpu" or gpus < launch.local_size):
        raise UsageError(
            f"--backend nccl needs a GPU per rank: found {gpus if device != 'cpu' else 0}, asked for {launch.local_size}; "
            "use --backend gloo"
        )
    on_gpu = gpus > 0 and device != "cpu"
    if backend == "auto":
        if launch.size == 1 and launch.launcher == "none":
            backend = "serial"
        else:
            others = "mpi" if launch.launcher == "mpirun" else "gloo"
            backend = "nccl" if on_gpu and gpus >= launch.local_size else others
    elif backend == "mpi" and launch.launcher in ("torchrun", "torch.distributed"):
        raise UsageError(
            f"--backend mpi needs ranks that MPI knows, and {launch.launcher} started these; use mpirun or srun"
        )
    elif backend not in ("serial", "mpi") and launch.launcher == "none":
        raise UsageError(f"--backend {backend} needs ranks: start with torchrun or srun, or use --backend serial")
    if not on_gpu:
        return backend, torch.device("cpu")
    place = torch.device("cuda", launch.local_rank % gpus)
    torch.cuda.set_device(place)
    return backend, place


def _set_threads(launch: Launch, threads: int | None) -> None:
    if threads is None and launch.local_size > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // launch.local_size)
    if threads is not None:
        torch.set_num_threads(threads)


def _stay_on_this_host(launch: Launch) -> None:
    """Where all ranks are known to be on one host, let gloo listen on its loopback interface alone."""
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if _knows_hosts(launch) and launch.local_size == launch.size and loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)


def _reach_other_hosts(launch: Launch, store: dist.Store) -> None:
    """Where ranks are on several hosts, let gloo listen on the interface that the way to the meeting host leads over.

    gloo itself takes the address that the host's own name resolves to: on Debian 127.0.1.1, where no other host finds it.
    The meeting host, which holds the store, may know itself so, too; it learns its address from the others. Where all
    ranks know it so, the several hosts are one.
    """
    if not _knows_hosts(launch) or launch.local_size == launch.size:
        return
    here, there = (launch.address and route(launch.address)) or ("", "")
    inside = bool(here) and is_loopback(here)
    store.set(f"way/{launch.rank}", "" if inside else there)
    if "GLOO_SOCKET_IFNAME" in os.environ or not here:
        return
    if inside:
        try:
            # the last rank is the one most likely on another host
            told = (store.get(f"way/{rank}").decode() for rank in reversed(range(launch.size)))
            here = next((address for address in told if address), here)
        except RuntimeError as error:
            raise CommunicationError(
                f"rank {launch.rank} of {launch.size}: not all ranks came to {launch.address}:{launch.port} in time: "
                f"{str(error).splitlines()[0]}"
            ) from error
    name = interface_of(here)
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def _knows_hosts(launch: Launch) -> bool:
    """Whether the launcher has said how many ranks this host has."""
    return launch.launcher in ("slurm", "mpirun") or "LOCAL_WORLD_SIZE" in os.environ


def _store(launch: Launch, timeout: float) -> tuple[dist.Store, dist.Store]:
    """The launcher's store, and one of this attempt's own: the former still holds the addresses of ranks it has restarted."""
    global _connections
    limit = datetime.timedelta(seconds=timeout)
    key = (launch.address, launch.port, launch.attempt)
    try:
        if key not in _stores:
            if launch.launcher == "torchrun":
                store, _, _ = next(dist.rendezvous("env://", launch.rank, launch.size, timeout=limit))
            elif launch.launcher == "mpirun" and not (launch.address and launch.port):
                store = _store_found_by_mpi(launch, limit)
            else:
                _check_resolves(launch.address)
                store = dist.TCPStore(launch.address, launch.port, launch.size, launch.rank == 0, limit)
            _stores[key] = store
    except UsageError:
        raise
    except (RuntimeError, ValueError) as error:
        raise CommunicationError(
            f"rank {launch.rank} of {launch.size} did not reach the others at {launch.address}:{launch.port} within "
            f"{timeout:g} s: {str(error).splitlines()[0]}"
        ) from error
    _connections += 1
    base = _stores[key]
    return base, dist.PrefixStore(f"dhf/attempt{launch.attempt}/connection{_connections}", base)


def _store_found_by_mpi(launch: Launch, limit: datetime.timedelta) -> dist.Store:
    """A store on a free port of rank 0, which tells the others by an MPI broadcast."""
    world = load().COMM_WORLD
    check_size(world.Get_size(), os.environ)
    store, place = None, None
    if launch.rank == 0:
        address = launch.address or ("127.0.0.1" if launch.local_size == launch.size else _own_address())
        store = dist.TCPStore(address, 0, launch.size, True, limit, wait_for_workers=False)
        place = address, store.port
    address, port = world.bcast(place)
    return store or dist.TCPStore(address, port, launch.size, False, limit)


def _own_address() -> str:
    """An address of this host that other hosts may reach."""
    address = socket.gethostbyname(socket.gethostname())
    if not address.startswith("127."):
        return address
    way = route("192.0.2.1")  # stands for all that is outside
    return way[0] if way is not None else address


def _check_resolves(host: str) -> None:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        raise UsageError(
            f"host {host!r} of rank 0 does not resolve; set MASTER_ADDR to an address every rank reaches"
        ) from None
