"""The MPIs of this machine: the mpich that dhf[mpi] installs, and an Open MPI of the system."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["MPIS", "starts", "tidy"]

MPIS = ("mpich", "openmpi")


def starts(mpi: str, ranks: int) -> list[str]:
    """What stands before a command to start it on so many ranks; skips the test where something is missing."""
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("needs mpi4py: pip install 'dhf[mpi]'")
    command = _mpich() if mpi == "mpich" else _openmpi()
    if not command:
        where = f"mpiexec in {sys.prefix}/bin" if mpi == "mpich" else "mpirun of Open MPI on PATH"
        pytest.skip(f"needs an {where}")
    return [*command, "-n", str(ranks)]


@functools.cache
def _mpich() -> list[str]:
    path = shutil.which("mpiexec", path=f"{sys.prefix}/bin")
    return [path] if path else []


@functools.cache
def _openmpi() -> list[str]:
    for folder in os.get_exec_path():  # the first mpirun on PATH may be mpich's
        path = shutil.which("mpirun", path=folder)
        if path and "Open MPI" in subprocess.run([path, "--version"], capture_output=True, text=True).stdout:
            return [path, *(["--allow-run-as-root"] if os.geteuid() == 0 else []), "--oversubscribe"]
    return []


@pytest.fixture(scope="module")
def tidy() -> Iterator[None]:
    """Afterwards, no shared memory that mpich has left behind where ranks were killed."""
    folder, pattern = Path("/dev/shm"), "mpich_shm_*"
    before = set(folder.glob(pattern))
    yield
    left = set(folder.glob(pattern)) - before
    if left:
        maps = "".join(_text(path) for path in Path("/proc").glob("[0-9]*/maps"))
        for path in left:
            if str(path) not in maps:  # else it is of somebody's run
                path.unlink(missing_ok=True)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
