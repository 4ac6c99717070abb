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


def test_two_ranks_find_what_one_does_and_say_it_once(folder):
    """Three commands by one launch, each joining the ranks anew."""
    shared = ["--problem", "mine.py:build", "--micro-batch-size", "4", "--threads", "1"]
    solve = ["solve", *shared, "--cg-rtol", "1e-11", "--vectors", "sharded", "--output", "OUT.pt"]
    spectrum = ["spectrum", *shared, "--smallest", "2", "--output", "OUT.json"]
    influence = ["influence", *shared, "--cg-rtol", "1e-11", "--queries", "0-2", "--output", "OUT.npy"]
    commands = [solve, spectrum, influence]

    def named(name: str) -> list[list[str]]:
        return [[flag.replace("OUT", f"{name}-{command[0]}") for flag in command] for command in commands]

    Path("all.py").write_text(
        f"import sys\nfrom dhf.__main__ import main\nsys.exit(max(main(command) for command in {named('two')!r}))\n"
    )
    code, out, err = Launched(2, program=("all.py",)).wait()
    assert code == 0, err
    assert [main(command) for command in named("one")] == [0, 0, 0]

    two, one = (torch.load(f"{name}-solve.pt", weights_only=True) for name in ("two", "one"))
    assert float((two - one).norm() / one.norm()) < 1e-9
    results = [json.loads(Path(f"{name}-solve.json").read_text()) for name in ("two", "one")]
    assert [r["world_size"] for r in results] == [2, 1]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-13)
    assert results[0]["iterations"] == results[1]["iterations"]

    found, alone = (json.loads(Path(f"{name}-spectrum.json").read_text()) for name in ("two", "one"))
    assert found["eigenvalues"] == pytest.approx(alone["eigenvalues"], rel=1e-9)
    assert found["trace"]["value"] == pytest.approx(alone["trace"]["value"], rel=1e-11)
    assert found["density"]["values"] == pytest.approx(alone["density"]["values"], rel=1e-6, abs=1e-9)

    many, single = (np.load(f"{name}-influence.npy") for name in ("two", "one"))
    np.testing.assert_allclose(many, single, rtol=1e-8, atol=1e-10 * np.abs(single).max())

    said = "problem   mine.py:build at the initial parameters, 2 rank(s) over gloo"
    lines = out.splitlines()
    assert lines.count(said) == 3
    assert sum(line.startswith("written   ") for line in lines) == 3
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
