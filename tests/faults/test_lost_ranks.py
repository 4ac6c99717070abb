"""Ranks that are killed, stopped or slow: the others name them, nobody hangs, and nothing that was reached is lost."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from dhf.run import checkpoint
from tests.faults.forked import Run, run, start

FAULT = ("--options.at", "3", "--options.place", "product")
FREE = (
    "seconds",
    "own_seconds",
    "waiting_seconds",
    "slowest_rank",
    "peak_memory_mb",
    "resident",
    "files",
)  # what two equal runs differ in


def decided(run: Run) -> list[dict[str, Any]]:
    """The metrics without clocks."""
    return [{k: v for k, v in row.items() if k not in FREE} for row in run.rows()]


KILLED = ("--steps", "6", "--checkpoint-every", "2")


@pytest.fixture(scope="module")
def not_killed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(4, tmp_path_factory.mktemp("whole"), *KILLED)


@pytest.mark.parametrize("rank", range(4))
def test_a_rank_killed_in_a_solve(tmp_path: Path, not_killed: Run, rank: int) -> None:
    flags = KILLED
    fault = ("--options.fault", "SIGKILL", "--options.rank", str(rank), *FAULT)
    died = start(4, tmp_path / "died", *flags, *fault)
    codes = died.wait(within=15)  # of these 3 are the roll-call, the rest is the start
    assert codes == [-9 if r == rank else 5 for r in range(4)], died.said()
    assert f"error: rank {rank} missing in all-reduce: died (" in died.said(stream="err")
    assert died.said(stream="err").count("error:") == 1
    result = died.result()
    assert (result["failed_rank"], result["reason"], result["exit_code"]) == (rank, "COMMUNICATION_FAILED", 5)
    found, damaged = checkpoint.find(died.directory)
    assert found is not None
    assert (found[0].name, damaged) == ("step-2", [])
    run(4, tmp_path / "died", *flags, "--resume", "auto")
    assert decided(died) == decided(not_killed)


def test_a_stopped_rank_is_named_after_the_timeout(tmp_path: Path) -> None:
    fault = ("--options.fault", "SIGSTOP", "--options.rank", "1", *FAULT)
    stopped = start(3, tmp_path, "--steps", "6", "--timeout", "4", *fault)
    stopped.wait_for_step(2)
    for rank in (0, 2):
        stopped.processes[rank].join(20)
        assert stopped.processes[rank].exitcode == 5, stopped.said()
    assert "error: rank 1 missing in all-reduce: stopped, or busy for longer than the timeout of 4 s" in stopped.said()
    assert stopped.result()["failed_rank"] == 1
    # waking up, the rank finds the others gone
    stopped.kill(1, signal.SIGCONT)
    assert stopped.wait(within=20)[1] == 5


def test_a_rank_that_goes_on_in_time_changes_nothing(tmp_path: Path) -> None:
    flags = ("--steps", "6", "--timeout", "30")
    fault = ("--options.fault", "SIGSTOP", "--options.rank", "1", *FAULT)
    paused = start(3, tmp_path / "paused", *flags, *fault)
    paused.wait_for_step(2)
    time.sleep(1.0)
    assert len(paused.rows()) == 2
    paused.kill(1, signal.SIGCONT)
    assert paused.wait() == [0, 0, 0], paused.said()
    whole = run(3, tmp_path / "whole", *flags)
    assert decided(paused) == decided(whole)


def test_a_slow_rank_changes_nothing_and_is_named(tmp_path: Path) -> None:
    slow = ("--options.fault", "sleep", "--options.seconds", "0.2", "--options.rank", "2", "--options.at", "0")
    slowed = run(3, tmp_path / "slowed", "--steps", "4", *slow)
    whole = run(3, tmp_path / "whole", "--steps", "4")
    assert decided(slowed) == decided(whole)
    for row in slowed.rows():
        assert row["slowest_rank"] == 2
        assert row["own_seconds"][2] >= 0.2
        assert all(row["waiting_seconds"][r] >= 0.15 for r in (0, 1))
    assert "slowest rank 2 with " in slowed.said(0, "out")


def test_500_steps_leave_memory_and_open_files_flat(tmp_path: Path) -> None:
    rows = run(2, tmp_path, "--steps", "500", "--checkpoint-every", "50", "--target-loss", "-1").rows()
    # the small problem converges before; a step without decrease takes the same way
    early, late = rows[min(100, len(rows) // 3)], rows[-1]
    assert late["files"] <= early["files"]
    assert late["resident"] - early["resident"] < 20 * 2**20
