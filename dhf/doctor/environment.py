"""What this machine and its launcher offer: versions, devices, cores and threads, ways for ranks to talk."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from dhf.byte_size import bytes_in_words
from dhf.comm import Communicator
from dhf.comm.launch import detect
from dhf.doctor.finding import ERROR, NOTE, Section
from dhf.errors import UsageError
from dhf.memory import available_memory
from dhf.version import __version__

__all__ = ["look_around"]

_VARIABLES = re.compile(
    r"^(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_RESTART_COUNT|OMP_NUM_THREADS"
    r"|CUDA_VISIBLE_DEVICES|GLOO_SOCKET_IFNAME|NCCL_\w+|SLURM_(JOB_ID|NTASKS|NNODES|PROCID|LOCALID|STEP_NUM_TASKS|NODELIST)"
    r"|OMPI_COMM_WORLD_(RANK|SIZE)|PMI_(RANK|SIZE))$"
)


def look_around(comm: Communicator, environment: Mapping[str, str]) -> Section:
    """Versions, devices and launchers. Collective.

    Args:
        comm: How ranks talk.
        environment: This process's variables.
    """
    section = Section("environment")
    section.fact(
        "dhf", f"{__version__}, python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}"
    )
    section.fact("system", f"{platform.system()} {platform.machine()}, {_cores()} cores for this process")
    section.fact("GPUs", _gpus())
    section.fact("torch.distributed", _torch_distributed())
    section.fact("MPI", _mpi(comm))
    section.fact("SLURM", _slurm(environment))
    section.fact("extras", _extras())
    section.fact("C++ compiler", shutil.which("c++") or shutil.which("g++") or "none: --products compiled needs one")
    _ranks(section, comm)
    shown = [f"{name}={value}" for name, value in sorted(environment.items()) if _VARIABLES.match(name)]
    section.fact("variables", " ".join(shown) or "none of a launcher")
    _launcher(section, comm, environment)
    return section


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{gpu.name} ({bytes_in_words(gpu.total_memory)})" for gpu in found)


def _torch_distributed() -> str:
    if not dist.is_available():
        return "none: torch was built without"
    nccl = "without NCCL"
    if dist.is_nccl_available() and torch.cuda.is_available():
        nccl = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    return f"{'gloo' if dist.is_gloo_available() else 'without gloo'}, {nccl}"


def _mpi(comm: Communicator) -> str:
    version = _version("mpi4py")
    beside = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    starter = shutil.which("mpirun", path=beside) or shutil.which("mpiexec", path=beside)
    parts = [
        f"mpi4py {version}" if version else "no mpi4py: pip install 'dhf[mpi]'",
        starter or "no mpirun",
    ]
    if comm.backend == "mpi":  # loading it starts MPI
        from mpi4py import MPI

        parts.append(" ".join(MPI.Get_library_version().splitlines()[0].split()))
    return ", ".join(parts)


def _slurm(environment: Mapping[str, str]) -> str:
    job = environment.get("SLURM_JOB_ID")
    found = shutil.which("srun") or "no srun on the path"
    return f"{found}, in job {job}" if job else found


def _extras() -> str:
    wanted = {"matplotlib": "pictures", "tensorboard": "tensorboard"}
    found = [f"{name} {_version(name)}" for name in wanted if _version(name)]
    lacking = [f"no {name}" for name in wanted if not _version(name)]
    return ", ".join(found + lacking)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _ranks(section: Section, comm: Communicator) -> None:
    """Who runs where, with how many threads and how much memory."""
    mine = (socket.gethostname(), str(comm.device), torch.get_num_threads(), _cores(), available_memory(comm.device))
    everyone = comm.gather_objects(mine)
    section.fact("ranks", f"{comm.size} over {comm.backend}" if comm.size > 1 else f"one process ({comm.backend})")
    for host in dict.fromkeys(where for where, *_ in everyone):
        here = [rank for rank, facts in enumerate(everyone) if facts[0] == host]
        devices = ", ".join(dict.fromkeys(everyone[rank][1] for rank in here))
        threads, cores = sum(everyone[rank][2] for rank in here), everyone[here[0]][3]
        memory = min(everyone[rank][4] for rank in here)
        left = bytes_in_words(memory) if math.isfinite(memory) else "unknown memory"
        each = f"{everyone[here[0]][2]} thread(s) each" if len(here) > 1 else f"{threads} thread(s)"
        section.fact(
            f"on {host}",
            f"rank {_span(here)} on {devices}, {each}, {cores} cores, {left} available",
        )
        if threads > cores:
            section.find(
                NOTE,
                f"{threads} threads of {len(here)} rank(s) share {cores} cores",
                f"host {host}",
                f"--threads {max(1, cores // len(here))}"
                if cores >= len(here)
                else f"start at most {cores} ranks there",
            )


def _span(ranks: list[int]) -> str:
    if len(ranks) > 1 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"{ranks[0]} to {ranks[-1]}"
    return ", ".join(map(str, ranks))


def _launcher(section: Section, comm: Communicator, environment: Mapping[str, str]) -> None:
    """Whether the launcher's variables and the ranks that have met fit together."""
    try:
        launch = detect(environment)
    except UsageError as error:
        what, _, remedy = str(error).partition(": ")
        section.find(ERROR, what, "the launcher's variables", remedy)
        return
    section.fact("launcher", launch.launcher)
    if launch.launcher != "none" and launch.size != comm.size:
        section.find(
            ERROR,
            f"{launch.launcher} speaks of {launch.size} ranks, and {comm.size} have met",
            "the launcher's variables",
            "start again with one launcher alone",
        )
    tasks = environment.get("SLURM_NTASKS", "1")
    if comm.size == 1 and tasks.isdigit() and int(tasks) > 1 and launch.launcher == "none":
        section.find(
            NOTE,
            f"the SLURM job has {tasks} tasks, and this is one process",
            "SLURM_NTASKS",
            "start ranks with srun, or with launch/slurm_torchrun.sbatch",
        )
