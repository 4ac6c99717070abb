"""Trainer runs of several ranks, forked from this process, so that they start in no time: what torchrun would set is set.

run = start(3, tmp_path, "--steps", "9")      # three processes with an agent's store
run.wait_for_step(2)
run.kill(1, signal.SIGKILL)
codes = run.wait(within=10)
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dhf.train import main

FILE = Path(__file__).with_name("faulty.py")
# faults wait for a product of a solve: let there be many
LONG_SOLVES = ("--preset", "deep-net", "--preconditioner", "none", "--cg-rtol", "1e-5", "--cg-max-iterations", "250")
BOUND = 60.0
_fork = multiprocessing.get_context("fork")


class Run:
    """The processes of one run, and what they write."""

    def __init__(
        self,
        size: int,
        folder: Path,
        flags: tuple[str, ...],
        prepare: Callable[[int], None] | None,
        flags_of: Callable[[int], tuple[str, ...]],
    ) -> None:
        assert not dist.is_initialized()
        self.folder, self.directory = folder, folder / "run"
        # the store is the agent's, as under torchrun: it outlives any rank
        seconds = datetime.timedelta(seconds=30)
        self._store: dist.TCPStore | None = dist.TCPStore("127.0.0.1", 0, None, True, seconds, wait_for_workers=False)
        environment = {
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        problem = () if "--problem" in flags else ("--problem", f"{FILE}:build", *LONG_SOLVES)
        argv = [*problem, "--dtype", "float64", "--run-dir", str(self.directory), *flags]
        self.processes = [
            _fork.Process(target=_rank, args=(r, environment, folder, [*argv, *flags_of(r)], prepare))
            for r in range(size)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads; torch is held to one
            for process in self.processes:
                process.start()

    def kill(self, rank: int, number: int) -> None:
        """Send one rank a signal."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait_for_step(self, step: int) -> None:
        """Until so many steps are in the metrics."""
        end = time.monotonic() + BOUND
        while len(self.rows()) < step:
            assert time.monotonic() < end, self.said()
            assert any(p.is_alive() for p in self.processes), self.said()
            time.sleep(0.01)

    def wait(self, within: float = BOUND) -> list[int | None]:
        """The exit codes; a run that takes longer than ``within`` seconds is killed and fails the test."""
        end = time.monotonic() + within
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        late = [r for r, p in enumerate(self.processes) if p.is_alive()]
        self.stop()
        assert not late, f"ranks {late} still ran after {within:g} s\n{self.said()}"
        return [p.exitcode for p in self.processes]

    def stop(self) -> None:
        """Kill and reap what is left."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
        self._store = None  # its server is a thread, and threads and forks do not mix

    def said(self, rank: int | None = None, stream: str = "*") -> str:
        """What one rank, or all, have printed."""
        who = "*" if rank is None else str(rank)
        return "".join(p.read_text() for p in sorted(self.folder.glob(f"{stream}.{who}")))

    def rows(self) -> list[dict[str, Any]]:
        """The metrics, whole lines alone."""
        path = self.directory / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def result(self) -> dict[str, Any]:
        """result.json."""
        return json.loads((self.directory / "result.json").read_text())


def start(
    size: int,
    folder: Path,
    *flags: str,
    prepare: Callable[[int], None] | None = None,
    flags_of: Callable[[int], tuple[str, ...]] = lambda rank: (),
) -> Run:
    """Start a run of the faulty problem; ``prepare(rank)`` is called in each process first, ``flags_of(rank)`` are its own."""
    folder.mkdir(exist_ok=True)
    return Run(size, folder, flags, prepare, flags_of)


def run(size: int, folder: Path, *flags: str, within: float = BOUND, code: int | None = 0, **options: Any) -> Run:
    """Start a run, wait for it, and check that every rank ended with ``code``."""
    started = start(size, folder, *flags, **options)
    codes = started.wait(within)
    assert codes == [code] * size, f"{codes}\n{started.said()}"
    return started


def _rank(
    rank: int, environment: dict[str, str], folder: Path, argv: list[str], prepare: Callable[[int], None] | None
) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    for stream, fd in (("out", 1), ("err", 2)):
        file = os.open(folder / f"{stream}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, fd)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare(rank)
    code = 1
    try:
        code = main(argv)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
