"""dhf.train under a real torchrun: parity with one process, errors on all ranks, killed ranks and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.launch

LAUNCHER = Path(__file__).parents[2] / "launch" / "torchrun.py"
BOUND = 120  # seconds: a hang, not a slow machine

FILE = """
import os, torch, dhf

def build(fault: str = "", samples: int = 10, seconds: float = 0.0) -> dhf.Problem:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 3, generator=generator)
    y = torch.randint(0, 4, (samples,), generator=generator)
    if fault == "hole":
        x[samples - 1, 0] = float("nan")
    if fault == "range":
        y[samples - 1] = 4
    if fault == "one-rank" and os.environ["RANK"] == "1":
        raise OSError("this host has no such disk")
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4))
    def pause(module):
        import time
        time.sleep(seconds)
        return {}
    return dhf.Problem(dhf.Objective(module, torch.nn.CrossEntropyLoss()), (x, y), metrics=pause)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FILE)
    return tmp_path


def command(ranks: int, *flags: str) -> list[str]:
    launch = [sys.executable, str(LAUNCHER), "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={ranks}"]
    return [*launch, "-m", "dhf.train", "--dtype", "float64", *flags]


def torchrun(ranks: int, *flags: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(ranks, *flags), capture_output=True, text=True, timeout=BOUND, env=environment, check=False
    )


def losses(directory: str) -> list[float]:
    return [json.loads(line)["loss_after"] for line in Path(directory, "metrics.jsonl").read_text().splitlines()]


def test_four_ranks_train_the_digits_as_one_process_does(folder):
    flags = ("--steps", "3", "--checkpoint-every", "0")
    many = torchrun(4, *flags, "--run-dir", "four", "--micro-batch-size", "200")
    assert many.returncode == 0, many.stderr
    alone = subprocess.run(
        [sys.executable, "-m", "dhf.train", "--dtype", "float64", *flags, "--run-dir", "one"],
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )
    assert alone.returncode == 0, alone.stderr
    assert losses("four") == pytest.approx(losses("one"), rel=1e-9)
    result = json.loads(Path("four/result.json").read_text())
    assert (result["world_size"], result["reason"]) == (4, "STEPS_DONE")
    assert Path("four/plots/reconstructions.png").stat().st_size > 1000
    four, one = (torch.load(f"{d}/checkpoints/step-3/state.pt", weights_only=True)["module"] for d in ("four", "one"))
    for key, value in one.items():
        torch.testing.assert_close(four[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("fault", "code", "text"),
    [
        ("hole", 2, "error: rank 2: sample 9 of the data holds NaN or infinity"),
        ("range", 2, "error: rank 2: target 4 of sample 2 in its micro-batch is out of range"),
        ("one-rank", 5, "error: rank 1 ("),
    ],
)
def test_what_one_rank_finds_ends_all_with_one_message(folder, fault, code, text):
    done = torchrun(3, "--problem", "mine.py:build", "--options.fault", fault, "--run-dir", "run")
    assert done.returncode == code
    assert sum(text in line for line in done.stderr.splitlines()) == 1, done.stderr
    if code == 2:
        assert "Traceback" not in done.stderr
    assert not Path("run").exists()


def test_more_ranks_than_samples_is_legal_and_said(folder):
    done = torchrun(4, "--problem", "mine.py:build", "--options.samples", "2", "--steps", "2", "--run-dir", "run")
    assert done.returncode == 0, done.stderr
    assert "warning: 2 samples for 4 ranks: rank 2, 3 has none; use --nproc_per_node=2 or more data" in done.stdout
    alone = torchrun(1, "--problem", "mine.py:build", "--options.samples", "2", "--steps", "2", "--run-dir", "one")
    assert alone.returncode == 0, alone.stderr
    assert losses("run") == pytest.approx(losses("one"), rel=1e-9)


def start_slow_run(ranks: int) -> tuple[subprocess.Popen, list[int]]:
    """A run that is well under way, and the process of each rank."""
    flags = ("--problem", "mine.py:build", "--options.seconds", "0.05", "--steps", "100000", "--run-dir", "run")
    process = subprocess.Popen(command(ranks, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = Path("run/metrics.jsonl")
    end = time.monotonic() + BOUND
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        rank = [v for v in variables if v.startswith(b"RANK=")]
        if rank and parent == process.pid:
            found[int(rank[0][5:])] = int(entry.name)
    return process, [found[rank] for rank in range(ranks)]


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to find the ranks")


@needs_proc
def test_a_killed_rank_ends_the_others_with_an_error(folder):
    process, workers = start_slow_run(3)
    os.kill(workers[1], signal.SIGKILL)
    _, err = process.communicate(timeout=BOUND)
    assert process.returncode == 5
    assert "rank 1 was ended by SIGKILL" in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_any_rank_stops_all_with_a_checkpoint(folder, number):
    process, workers = start_slow_run(3)
    os.kill(workers[2], number)
    process.communicate(timeout=BOUND)
    result = json.loads(Path("run/result.json").read_text())
    assert (result["reason"], result["exit_code"]) == ("INTERRUPTED", 75)
    assert process.returncode == 75
    assert Path("run/checkpoints/LATEST").read_text().strip() == f"step-{result['steps']}"
    assert len(losses("run")) == result["steps"]
