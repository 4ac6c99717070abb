"""dhf.train under a real torchrun: parity with one process, and errors on all ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.launched import BOUND, Launched

pytestmark = pytest.mark.launch

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


def torchrun(ranks: int, *flags: str) -> tuple[int, str, str]:
    return Launched(ranks, "--dtype", "float64", *flags).wait()


def losses(directory: str) -> list[float]:
    return [json.loads(line)["loss_after"] for line in Path(directory, "metrics.jsonl").read_text().splitlines()]


def test_four_ranks_train_the_digits_as_one_process_does(folder):
    flags = ("--steps", "3", "--checkpoint-every", "0")
    many = torchrun(4, *flags, "--run-dir", "four", "--micro-batch-size", "200")
    assert many[0] == 0, many[2]
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
    assert done[0] == code
    assert sum(text in line for line in done[2].splitlines()) == 1, done[2]
    if code == 2:
        assert "Traceback" not in done[2]
    assert not Path("run").exists()


def test_more_ranks_than_samples_is_legal_and_said(folder):
    done = torchrun(4, "--problem", "mine.py:build", "--options.samples", "2", "--steps", "2", "--run-dir", "run")
    assert done[0] == 0, done[2]
    assert "warning: 2 samples for 4 ranks: rank 2, 3 has none; use --nproc_per_node=2 or more data" in done[1]
    alone = torchrun(1, "--problem", "mine.py:build", "--options.samples", "2", "--steps", "2", "--run-dir", "one")
    assert alone[0] == 0, alone[2]
    assert losses("run") == pytest.approx(losses("one"), rel=1e-9)
