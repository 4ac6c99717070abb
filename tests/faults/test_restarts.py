"""A rank is killed in a solve, and torchrun starts all ranks again: they find one another, and go on from the checkpoint."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest

from tests.faults.forked import FILE, LONG_SOLVES, run
from tests.launched import Launched

pytestmark = pytest.mark.launch

STEPS = ("--steps", "8", "--checkpoint-every", "2")


def options(rendezvous: str, restarts: int = 1) -> tuple[str, ...]:
    """Those of torchrun."""
    again = (f"--max-restarts={restarts}", "--monitor-interval=0.1")
    if rendezvous == "standalone":
        return ("--standalone", *again)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return ("--nnodes=1", "--node-rank=0", "--master-addr=127.0.0.1", f"--master-port={port}", *again)


def start_and_kill(rendezvous: str, rank: int, *flags: str) -> tuple[int, str, str]:
    """A run whose rank kills itself in step 5 of its first attempt."""
    fault = ("--options.fault", "SIGKILL", "--options.rank", str(rank), "--options.at", "5")
    problem = ("--problem", f"{FILE}:build", "--dtype", "float64", *LONG_SOLVES)
    return Launched(3, *problem, *STEPS, *fault, *flags, options=options(rendezvous)).wait()


def losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss_after"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def check_restarted(done: tuple[int, str, str], directory: Path, truth: list[float]) -> None:
    code, out, err = done
    assert code == 0, out + err
    # four steps had been taken; the survivors have saved the fourth, or the periodic checkpoint of it stood already
    assert re.search(r"attempt 2: resumed at step 4 from \S+/checkpoints/step-4", out), out
    assert losses(directory) == truth
    result = json.loads((directory / "result.json").read_text())
    assert (result["reason"], result["steps"]) == ("STEPS_DONE", 8)


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The run without a fault."""
    return losses(run(3, tmp_path_factory.mktemp("truth"), *STEPS).directory)


@pytest.mark.parametrize(("rendezvous", "rank"), [("standalone", 0), ("static", 1)])
def test_a_killed_rank_is_started_again(rendezvous: str, rank: int, truth: list[float]) -> None:
    check_restarted(start_and_kill(rendezvous, rank, "--run-dir", "run"), Path("run"), truth)


def test_the_default_directory_is_that_of_the_first_attempt(truth: list[float]) -> None:
    done = start_and_kill("standalone", 2)
    (directory,) = Path("runs").iterdir()
    check_restarted(done, directory, truth)


def test_an_attempt_that_ended_for_good_is_not_repeated() -> None:
    """A usage error after the directory was taken, and a signal to one rank, end the run; another attempt changes nothing."""
    flags = ("--problem", f"{FILE}:build", *LONG_SOLVES, "--run-dir", "run", "--steps", "5000", "--target-loss", "-1")
    fault = ("--options.fault", "SIGTERM", "--options.rank", "1", "--options.at", "3")
    code, out, err = Launched(2, *flags, *fault, options=options("standalone")).wait()
    assert code == 75, out + err
    assert "attempt 2: an earlier attempt ended for good with exit code 75" in out
    assert len(losses(Path("run"))) in (2, 3)


@pytest.mark.long
@pytest.mark.parametrize("rendezvous", ["standalone", "static"])
@pytest.mark.parametrize("turn", range(20))
def test_twenty_of_twenty(rendezvous: str, turn: int, truth: list[float]) -> None:
    check_restarted(start_and_kill(rendezvous, turn % 3, "--run-dir", "run"), Path("run"), truth)
