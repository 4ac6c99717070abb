"""Launch: how this process was started, by the variables of torchrun, srun or mpirun."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from dhf.errors import UsageError

__all__ = ["Launch", "detect", "first_host"]


@dataclasses.dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
        launcher: ``"torchrun"`` (or anything that sets its variables), ``"slurm"``, ``"mpirun"``, ``"torch.distributed"`` (a
            group that is open already) or ``"none"``.
        rank: This rank.
        size: Number of ranks.
        local_rank: This rank's number on its host.
        local_size: Ranks on this host.
        address: Host name or address of rank 0.
        port: TCP port of the store.
        attempt: How often the launcher has restarted the ranks.
    """

    launcher: str
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = "localhost"
    port: int = 0
    attempt: str = "0"


def detect(environment: Mapping[str, str]) -> Launch:
    """Read torchrun's or srun's variables.

    Raises:
        UsageError: If they are incomplete, or speak of a launcher that dhf cannot follow.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _from_torchrun(environment)
    # first, since mpirun may itself use srun to start a daemon per node, whose variables the ranks inherit
    if "OMPI_COMM_WORLD_SIZE" in environment or "MPI_LOCALNRANKS" in environment:
        return _from_mpirun(environment)
    # srun sets SLURM_STEP_NUM_TASKS for its tasks alone; a batch script has SLURM_NTASKS but is one process
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        return _from_slurm(environment)
    return _from_mpirun(environment) if "PMI_SIZE" in environment else Launch("none")


def _from_torchrun(environment: Mapping[str, str]) -> Launch:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not environment.get(name)]
    if missing:
        given = ", ".join(name for name in names if name not in missing)
        raise UsageError(
            f"{given} set but {', '.join(missing)} not: start with torchrun, set all of {', '.join(names)}, "
            "or unset them to run one process"
        )
    try:
        rank, size, port = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    except ValueError as error:
        raise UsageError(f"RANK, WORLD_SIZE and MASTER_PORT must be integers: {error}") from None
    if not 0 <= rank < size:
        raise UsageError(f"RANK={rank} is not in 0 to WORLD_SIZE-1={size - 1}")
    return Launch(
        "torchrun",
        rank,
        size,
        int(environment.get("LOCAL_RANK", rank)),
        int(environment.get("LOCAL_WORLD_SIZE", size)),
        environment["MASTER_ADDR"],
        port,
        environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def _from_mpirun(environment: Mapping[str, str]) -> Launch:
    """By the variables of Open MPI, or of MPICH and its kin."""

    def number(default: int, *names: str) -> int:
        return next((int(environment[name]) for name in names if name in environment), default)

    size = number(1, "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    if size == 1:
        return Launch("none")
    rank = number(0, "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    return Launch(
        "mpirun",
        rank,
        size,
        number(rank, "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"),
        number(size, "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"),
        environment.get("MASTER_ADDR", ""),
        int(environment.get("MASTER_PORT") or 0),
        environment.get("SLURM_RESTART_COUNT", "0"),
    )


def _from_slurm(environment: Mapping[str, str]) -> Launch:
    size = int(environment["SLURM_STEP_NUM_TASKS"])
    job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", "0"))
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    return Launch(
        "slurm",
        int(environment["SLURM_PROCID"]),
        size,
        int(environment.get("SLURM_LOCALID", "0")),
        # "2(x3),1" lists tasks per node; this node's entry is found by its position
        _tasks_on_node(
            environment.get("SLURM_STEP_TASKS_PER_NODE", str(size)), int(environment.get("SLURM_NODEID", "0"))
        ),
        environment.get("MASTER_ADDR") or first_host(nodes),
        # below the ports that the system gives out to connections
        int(environment.get("MASTER_PORT") or 20000 + (job * 17 + step) % 12000),
        environment.get("SLURM_RESTART_COUNT", "0"),
    )


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: ``"gpu[03-05,9],cpu1"`` gives ``"gpu03"``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise UsageError(f"cannot read the SLURM node list {nodes!r}; set MASTER_ADDR to the host of rank 0")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def _tasks_on_node(layout: str, node: int) -> int:
    counts: list[int] = []
    for part in layout.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UsageError(f"cannot read SLURM_STEP_TASKS_PER_NODE={layout!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts[node]
