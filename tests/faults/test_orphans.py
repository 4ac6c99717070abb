"""Whoever is killed, no process of the run is left: the agent, the script that started it, or a rank."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.faults.forked import FILE
from tests.launched import LAUNCH, Launched, needs_proc

pytestmark = [pytest.mark.launch, needs_proc]

PROBLEM = ("--problem", f"{FILE}:build", "--dtype", "float64", "--run-dir", "run", "--options.pause", "0.1")
FLAGS = (*PROBLEM, "--steps", "100000", "--target-loss", "-1", "--checkpoint-every", "0")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def check_saved() -> None:
    """The ranks have noticed, and stopped as on a signal."""
    result = json.loads(Path("run/result.json").read_text())
    assert (result["reason"], result["exit_code"]) == ("INTERRUPTED", 75)
    assert Path("run/checkpoints/LATEST").read_text() == f"step-{result['steps']}\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_a_killed_agent(number: int) -> None:
    """torchrun itself, with neither dhf's launcher nor a chance to end its ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    launched = Launched(3, *FLAGS, launcher=[*torchrun, "-m", "dhf.train"])
    launched.wait_for_step(2)
    assert sorted(r for r in launched.processes().values() if r is not None) == [0, 1, 2]
    os.kill(launched.process.pid, number)
    assert launched.wait_until_gone(within=30) == []
    check_saved()


def test_a_killed_shell() -> None:
    """The script that a user starts."""
    launched = Launched(2, "2", *FLAGS, launcher=["bash", str(LAUNCH / "local.sh")])
    launched.wait_for_step(2)
    os.kill(launched.process.pid, signal.SIGKILL)
    assert launched.wait_until_gone(within=30) == []
    check_saved()


def test_a_killed_rank() -> None:
    launched = Launched(3, *FLAGS)
    launched.wait_for_step(2)
    os.kill(launched.worker(1), signal.SIGKILL)
    code, _, err = launched.wait(within=30)
    assert code == 5
    assert "error: rank 1 was ended by SIGKILL" in err
    assert "error: rank 1 missing in " in err
    assert launched.wait_until_gone(within=5) == []
    assert json.loads(Path("run/result.json").read_text())["failed_rank"] == 1
