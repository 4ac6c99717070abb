"""python -m dhf COMMAND under a real torchrun: what many ranks find is what one finds, and it is said once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from dhf.__main__ import main
from tests.commands.problem_file import write_file
from tests.doctor.test_doctor import FAULTS
from tests.launched import Launched

pytestmark = pytest.mark.launch

CONTROL = re.compile(r"[^\n -~\u00a0-\uffff]")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    write_file(tmp_path)
    yield tmp_path
    torch.set_flush_denormal(False)


def torchrun(*command: str) -> tuple[int, str, str]:
    return Launched(2, *command, program=("-m", "dhf")).wait()


def test_two_ranks_solve_as_one_does_and_say_it_once(folder):
    flags = ("--problem", "mine.py:build", "--micro-batch-size", "4", "--cg-rtol", "1e-11", "--threads", "1")
    code, out, err = torchrun("solve", *flags, "--vectors", "sharded", "--output", "two.pt")
    assert code == 0, err
    assert main(["solve", *flags, "--output", "one.pt"]) == 0
    two, one = (torch.load(f"{name}.pt", weights_only=True) for name in ("two", "one"))
    assert float((two - one).norm() / one.norm()) < 1e-9
    results = [json.loads(Path(f"{name}.json").read_text()) for name in ("two", "one")]
    assert [r["world_size"] for r in results] == [2, 1]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-13)
    assert results[0]["iterations"] == results[1]["iterations"]
    lines = out.splitlines()
    assert len(lines) == len(set(lines)) == 8
    assert lines[0] == "problem   mine.py:build at the initial parameters, 2 rank(s) over gloo"
    assert not CONTROL.search(out)


@pytest.mark.parametrize("command", ["spectrum", "influence"])
def test_two_ranks_find_what_one_does(folder, command):
    flags = [command, "--problem", "mine.py:build", "--micro-batch-size", "4", "--threads", "1"]
    flags += ["--cg-rtol", "1e-11", "--queries", "0-2"] if command == "influence" else ["--smallest", "2"]
    suffix = "npy" if command == "influence" else "json"
    code, out, err = torchrun(*flags, "--output", f"two.{suffix}")
    assert code == 0, err
    assert main([*flags, "--output", f"one.{suffix}"]) == 0
    if command == "influence":
        two, one = (np.load(f"{name}.npy") for name in ("two", "one"))
        np.testing.assert_allclose(two, one, rtol=1e-8, atol=1e-10 * np.abs(one).max())
    else:
        two, one = (json.loads(Path(f"{name}.json").read_text()) for name in ("two", "one"))
        assert two["eigenvalues"] == pytest.approx(one["eigenvalues"], rel=1e-9)
        assert two["trace"]["value"] == pytest.approx(one["trace"]["value"], rel=1e-11)
        assert two["density"]["values"] == pytest.approx(one["density"]["values"], rel=1e-6, abs=1e-9)
    assert sum(line.startswith("problem   mine.py:build") for line in out.splitlines()) == 1
    assert not CONTROL.search(out)


def test_what_fails_on_one_rank_ends_the_command_on_all_with_one_line(folder):
    code, _, err = torchrun("solve", "--problem", "mine.py:build", "--options.fault", "one-rank", "--output", "x.pt")
    assert code == 5
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1
    assert "error: rank 1 (" in err
    assert "this host has no such disk" in err
    assert not Path("x.pt").exists()


def test_two_ranks_are_looked_at_and_one_reports(folder):
    flags = ("--problem", f"{FAULTS}:build", "--options.fault", "unused", "--threads", "1")
    code, out, err = torchrun("doctor", *flags, "--backend", "gloo")
    assert code == 6, err
    lines = out.splitlines()
    assert "  ranks                   2 over gloo" in lines
    assert sum(line.startswith("  all-reduce ") for line in lines) == 3
    assert "  NaN reaches all ranks   yes" in lines
    assert "  samples                 12 a step of 12; 6, 6 per rank" in lines
    after = lines[lines.index("to change") + 1]
    assert after.startswith(
        "  1 warning               parameter '1.spare.weight', '1.spare.bias': requires_grad_(False)"
    )
    assert sum(line == "environment" for line in lines) == 1
    assert not CONTROL.search(out)
