"""Stop signals, the time budget, the end of a SLURM job: a checkpoint of one step, and a resumed run that is the whole one."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.faults.forked import FILE, Run, run, start
from tests.faults.test_lost_ranks import decided
from tests.launched import Launched, needs_proc

FLAGS = ("--steps", "30", "--checkpoint-every", "0", "--target-loss", "-1")
PAUSE = ("--options.pause", "0.1")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that was not stopped."""
    return run(3, tmp_path_factory.mktemp("whole"), *FLAGS)


def check_stopped_and_resumed(stopped: Run, whole: Run) -> None:
    result = stopped.result()
    assert (result["reason"], result["exit_code"]) == ("INTERRUPTED", 75)
    assert 1 <= result["steps"] < 30
    assert (stopped.directory / "checkpoints" / "LATEST").read_text() == f"step-{result['steps']}\n"
    assert len(stopped.rows()) == result["steps"]
    run(3, stopped.folder, *FLAGS, "--resume", "auto")
    assert decided(stopped) == decided(whole)


@pytest.mark.parametrize(("name", "rank"), [("SIGTERM", 0), ("SIGUSR2", 2), ("SIGINT", 1)])
def test_a_signal_to_any_one_rank(tmp_path: Path, whole: Run, name: str, rank: int) -> None:
    stopped = start(3, tmp_path / "stopped", *FLAGS, *PAUSE)
    stopped.wait_for_step(3)
    stopped.kill(rank, getattr(signal, name))
    assert stopped.wait(within=20) == [75, 75, 75], stopped.said()
    check_stopped_and_resumed(stopped, whole)


def test_a_signal_in_the_middle_of_a_solve_leaves_that_step_out(tmp_path: Path, whole: Run) -> None:
    """Rank 1 sends it to itself within the third product of step 4."""
    fault = ("--options.fault", "SIGTERM", "--options.rank", "1", "--options.at", "4")
    stopped = run(3, tmp_path / "stopped", *FLAGS, *fault, code=75)
    assert stopped.result()["steps"] in (3, 4)  # 4 if the signal's thread spoke only after the last product
    check_stopped_and_resumed(stopped, whole)


def test_one_request_that_comes_twice_is_one_and_a_second_one_ends_the_process(tmp_path: Path) -> None:
    flags = ("--options.fault", "sleep", "--options.seconds", "30", "--options.place", "metrics", "--options.rank", "0")
    stuck = start(2, tmp_path, *FLAGS, *flags)
    stuck.wait_for_step(1)
    time.sleep(0.5)  # rank 0 sleeps in its metrics
    stuck.kill(0, signal.SIGTERM)
    stuck.kill(0, signal.SIGTERM)
    time.sleep(1.5)
    assert stuck.processes[0].is_alive()
    stuck.kill(0, signal.SIGTERM)
    assert stuck.wait(within=15) == [128 + signal.SIGTERM, 5], stuck.said()


def test_the_signals_are_the_users_choice(tmp_path: Path) -> None:
    stopped = start(2, tmp_path, *FLAGS, *PAUSE, "--stop-signals", "SIGUSR1")
    stopped.wait_for_step(2)
    stopped.kill(1, signal.SIGUSR1)
    assert stopped.wait(within=20) == [75, 75], stopped.said()
    killed = start(2, tmp_path / "again", *FLAGS, *PAUSE, "--stop-signals", "SIGUSR1")
    killed.wait_for_step(2)
    killed.kill(1, signal.SIGTERM)
    assert killed.wait(within=20) == [5, -signal.SIGTERM], killed.said()


def test_the_time_budget_stops_all_at_one_step(tmp_path: Path) -> None:
    ended = run(3, tmp_path, "--steps", "100000", "--target-loss", "-1", *PAUSE, "--time-budget", "1")
    result = ended.result()
    assert result["reason"] == "TIME_LIMIT"
    assert (ended.directory / "checkpoints" / "LATEST").read_text() == f"step-{result['steps']}\n"


def test_the_end_of_a_slurm_job_stops_the_run_with_75(tmp_path: Path) -> None:
    def prepare(rank: int) -> None:
        os.environ["SLURM_JOB_END_TIME"] = str(int(time.time()) + 60 + 2)

    ended = run(2, tmp_path, "--steps", "100000", "--target-loss", "-1", *PAUSE, prepare=prepare, code=75, within=30)
    assert (ended.result()["reason"], ended.result()["exit_code"]) == ("TIME_LIMIT", 75)


@needs_proc
@pytest.mark.launch
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2"])
def test_a_signal_to_the_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    problem = ("--problem", f"{FILE}:build", "--dtype", "float64", "--run-dir", "run")
    launched = Launched(3, *problem, *FLAGS, *PAUSE)
    launched.wait_for_step(3)
    os.kill(launched.process.pid, getattr(signal, name))
    code, out, err = launched.wait(within=40)
    assert code == 75, out + err
    assert "Traceback" not in err
    result = json.loads(Path("run/result.json").read_text())
    assert (result["reason"], result["exit_code"]) == ("INTERRUPTED", 75)
    assert Path("run/checkpoints/LATEST").read_text() == f"step-{result['steps']}\n"
    assert launched.wait_until_gone(within=5) == []
