"""Runs of dhf.train under a real torchrun, and the processes they consist of."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
BOUND = 120.0  # seconds: a hang, not a slow machine

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to find the ranks")


class Launched:
    """A run under torchrun, marked by a variable of its environment, so that all its processes can be found.

    Args:
        ranks: How many.
        flags: Of the program.
        launcher: The command that stands for ``torchrun --nproc-per-node=RANKS``; dhf's own by default.
        options: Of torchrun.
        program: What the ranks run, where the launcher is dhf's own.
    """

    def __init__(
        self,
        ranks: int,
        *flags: str,
        launcher: list[str] | None = None,
        options: tuple[str, ...] = ("--standalone",),
        program: tuple[str, ...] = ("-m", "dhf.train"),
    ) -> None:
        self._mark = f"DHF_TEST_RUN={uuid.uuid4()}"
        own = [
            sys.executable,
            str(LAUNCH / "torchrun.py"),
            *options,
            "--local-addr=127.0.0.1",
            f"--nproc-per-node={ranks}",
        ]
        arguments = [*(launcher if launcher is not None else [*own, *program]), *flags]
        name, _, value = self._mark.partition("=")
        # its own session, so that a test may end the whole process group of what it started
        self.process = subprocess.Popen(
            arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", name: value},
            start_new_session=True,
        )

    def processes(self) -> dict[int, int | None]:
        """The processes of the run that live: process number to rank, None for launchers."""
        found: dict[int, int | None] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                variables = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if self._mark in variables and state != "Z":
                rank = next((v[5:] for v in variables if v.startswith("RANK=")), None)
                found[int(entry.name)] = None if rank is None else int(rank)
        return found

    def worker(self, rank: int) -> int:
        """The process of a rank: the oldest, since a rank may have helpers."""
        return min(pid for pid, r in self.processes().items() if r == rank)

    def wait_for_step(self, step: int, directory: Path = Path("run")) -> None:
        """Until so many steps are in the metrics."""
        self.wait_for(directory / "metrics.jsonl", step)

    def wait_for(self, path: Path, lines: int) -> None:
        """Until a file has so many lines."""
        end = time.monotonic() + BOUND
        while not (path.exists() and path.read_text().count("\n") >= lines):
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < end
            time.sleep(0.05)

    def wait(self, within: float = BOUND) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of what was started."""
        try:
            out, err = self.process.communicate(timeout=within)
        except subprocess.TimeoutExpired:
            self.stop()
            raise
        return self.process.returncode, out, err

    def wait_until_gone(self, within: float) -> list[int]:
        """What still lives after so many seconds at most; it is then killed."""
        end = time.monotonic() + within
        while self.processes() and time.monotonic() < end:
            time.sleep(0.2)
        left = list(self.processes())
        self.stop()
        return left

    def stop(self) -> None:
        """Kill what is left."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
