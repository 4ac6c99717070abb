"""Cluster: a real SLURM on this machine, for as long as the tests take. Job: what was submitted to it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

__all__ = ["NODES", "Cluster", "Job", "cluster"]

ROOT = Path(__file__).parents[3]
SCRIPT = Path(__file__).with_name("cluster.sh")
NODES = 2
BOUND = 150.0  # seconds: a hang, not a slow machine
_NEEDED = ("slurmctld", "slurmd", "sbatch", "srun", "munged")
_OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@dataclasses.dataclass
class Job:
    """A job, or the task of an array.

    Attributes:
        number: As squeue prints it.
        log: What it prints.
        directory: Of its run.
    """

    cluster: Cluster
    number: str
    log: Path
    directory: Path
    _queued_again: float = math.inf

    def field(self, name: str) -> str:
        """One field of ``scontrol show job``, empty if it has none."""
        shown = self.cluster.call("scontrol", "-o", "show", "job", self.number)
        found = re.search(rf"(?:^|\s){name}=(\S*)", shown)
        return found[1] if found else ""

    def wait(self) -> int:
        """Until it is over, without SLURM's pause before a requeued job starts; its exit code."""
        self.until(lambda: self._is_over(), "over")
        code, _, number = self.field("ExitCode").partition(":")
        assert number == "0", f"ended by signal {number}\n{self.said()}"
        return int(code)

    def _is_over(self) -> bool:
        state = self.field("JobState")
        if state == "PENDING" and self.field("Reason") == "BeginTime":
            self._queued_again = min(self._queued_again, time.monotonic())
            # in the very second of its requeue, a node would not take it: "Job credential revoked"
            if time.monotonic() - self._queued_again > 2.0:
                self.cluster.call("scontrol", "update", f"JobId={self.number}", "StartTime=now")
        return state in _OVER

    def seconds_left(self) -> float:
        """Until its time is over."""
        return time.mktime(time.strptime(self.field("EndTime"), "%Y-%m-%dT%H:%M:%S")) - time.time()

    def wait_for_step(self, step: int) -> None:
        """Until so many steps are in the metrics."""
        self.until(lambda: len(self.rows()) >= step, f"at step {step}")

    def wait_for(self, text: str) -> None:
        """Until the log has this text."""
        self.until(lambda: text in self.said(), f"saying {text!r}")

    def until(self, done: Callable[[], bool], what: str) -> None:
        """Wait."""
        end = time.monotonic() + BOUND
        while not done():
            assert time.monotonic() < end, f"job {self.number} is not {what}\n{self.said()}"
            time.sleep(0.2)

    def said(self) -> str:
        """The log."""
        return self.log.read_text() if self.log.exists() else ""

    def rows(self) -> list[dict[str, Any]]:
        """The metrics, whole lines alone."""
        path = self.directory / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def losses(self) -> list[float]:
        """After each step."""
        return [row["loss_after"] for row in self.rows()]

    def result(self) -> dict[str, Any]:
        """result.json."""
        return json.loads((self.directory / "result.json").read_text())


class Cluster:
    """Submits jobs, from a folder of the test's own."""

    def __init__(self, folder: Path) -> None:
        self._environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "DHF_"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHON": sys.executable,
            "DHF_ROOT": str(ROOT),
        }

    def call(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        """Run a command of SLURM's; what it prints."""
        done = subprocess.run(
            command,
            env={**self._environment, **variables},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def submit(
        self,
        script: str,
        *flags: str,
        folder: Path,
        ranks: int = 2,
        options: tuple[str, ...] = (),
        task: str = "",
        **variables: str,
    ) -> Job:
        """Submit ``launch/slurm_SCRIPT.sbatch``, on two nodes of so many ranks; ``task`` is the array's task to follow."""
        shape = ("--ntasks-per-node=1", f"--cpus-per-task={ranks}")
        if script != "torchrun":
            shape = (f"--ntasks-per-node={ranks}",)
        job = f"{ROOT}/launch/slurm_{script}.sbatch"
        number = self.call(
            "sbatch", "--parsable", f"--nodes={NODES}", *shape, *options, job, *flags, cwd=folder, **variables
        )
        name = f"{number}_{task}" if task else number
        return Job(self, name, folder / f"slurm-{name}.out", folder / "runs" / f"slurm-{name}")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """SLURM with two nodes."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to start a SLURM of its own")
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: on Debian and Ubuntu, apt install slurm-wlm munge libpmi2-0")
    folder = Path(tempfile.mkdtemp(prefix="dhf-slurm-"))  # sockets need a short path
    down = ["bash", str(SCRIPT), "down", str(folder)]
    # also if this process is killed
    watch = subprocess.Popen([*down, str(os.getpid())], start_new_session=True)
    try:
        subprocess.run(["bash", SCRIPT, "up", folder, str(NODES), "6"], check=True, timeout=90)
        yield Cluster(folder)
    finally:
        subprocess.run(down, check=True, timeout=90)
        watch.kill()
        watch.wait()
        shutil.rmtree(folder)
