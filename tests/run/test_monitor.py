"""What a person sees of a run: plain bytes where there is no terminal, each line by one rank, and numbers that are the run's."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dhf.run.monitor import Monitor
from dhf.solvers import Iteration
from dhf.train import main
from tests.launched import Launched

PROBLEM = """
import warnings
import torch, dhf

def build(pause: float = 0.0) -> dhf.Problem:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(12, 4, generator=generator), torch.randint(0, 3, (12,), generator=generator)
    module = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))

    def metrics(module):
        warnings.warn("a warning of the problem's")
        return {"norm": sum(p.square().sum().item() for p in module.parameters())}

    return dhf.Problem(dhf.Objective(module, torch.nn.CrossEntropyLoss()), (x, y), metrics=metrics)
"""

FLAGS = ("--problem", "mine.py:build", "--steps", "3", "--solver", "cg", "--profile", "--record-solves", "all")
# what CI systems set so that programs write colours into their logs
COLOURFUL = {
    "FORCE_COLOR": "1",
    "CLICOLOR_FORCE": "1",
    "PY_COLORS": "1",
    "TTY_COMPATIBLE": "1",
    "TERM": "xterm-256color",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(PROBLEM)
    yield tmp_path
    torch.set_flush_denormal(False)


def environment(**more: str) -> dict[str, str]:
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "NO_COLOR")}
    return {**own, **more}


@pytest.mark.launch
def test_a_pipe_gets_text_and_newlines_alone(folder: Path) -> None:
    command = [sys.executable, "-m", "dhf.train", *FLAGS, "--monitor", "cg", "--run-dir", "run"]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(**COLOURFUL), timeout=100
    )
    assert done.returncode == 0, done.stdout
    assert set(done.stdout) <= {10, *range(32, 127), *range(128, 256)}
    text = done.stdout.decode()
    assert "  iteration     1  residual " in text
    assert "\nprofile " in text
    assert "warning: a warning of the problem's" in text


@pytest.mark.launch
def test_no_line_is_printed_by_two_ranks(folder: Path) -> None:
    run = Launched(
        2, *FLAGS, "--monitor", "cg", "--run-dir", "run", options=("--standalone", "--tee=3", "--log-dir=log")
    )
    code, out, err = run.wait()
    assert code == 0, err
    lines = [re.match(r"\[default(\d)\]:(.*)", line) for line in (out + err).splitlines()]
    by_rank = [{found[2] for found in lines if found and int(found[1]) == rank} for rank in (0, 1)]
    assert sum("  iteration " in line for line in by_rank[0]) > 3
    assert any(line.startswith("ended ") for line in by_rank[0])
    assert "warning: a warning of the problem's" in by_rank[0]
    assert by_rank[1] == set()
    texts = [found[2] for found in lines if found and found[2].startswith("  iteration ")]
    assert len(texts) == sum(len(solve["iteration"]) for solve in read(Path("run/solves.jsonl")))


@pytest.mark.launch
def test_a_terminal_gets_a_table_that_is_written_over(folder: Path) -> None:
    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "dhf.train", *FLAGS, "--run-dir", "run"]
    process = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=environment(TERM="xterm-256color", COLUMNS="160")
    )
    os.close(follower)
    seen = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while piece := os.read(leader, 65536):
            seen += piece
    assert process.wait(100) == 0
    assert b"\x1b[" in seen
    plain = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", seen).decode()
    assert "mine.py:build on 1 rank(s)" in plain
    assert f"{read(Path('run/metrics.jsonl'))[-1]['loss_after']:.6g}" in plain


def test_lines_of_steps_and_iterations_tell_what_is_recorded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FLAGS, "--monitor", "cg", "--run-dir", "run", "--dtype", "float64"]) == 0
    out = capsys.readouterr().out
    solves = read(Path("run/solves.jsonl"))
    found = re.findall(
        r"^  iteration +(\d+)  residual (\S+) +relative (\S+) +model +(\S+) +curvature (\S+)$", out, re.MULTILINE
    )
    expected = []
    for solve in solves:
        per_iteration = zip(solve["iteration"], solve["residual_norm"], solve["model"], solve["curvature"], strict=True)
        for number, residual, model, curvature in per_iteration:
            relative = residual / solve["right_hand_side_norm"]
            expected.append((str(number), f"{residual:.4e}", f"{relative:.3e}", f"{model:.5e}", _shown(curvature)))
    assert found == expected
    steps = [line.split() for line in out.splitlines() if re.match(r"^ +[123] ", line)]
    assert [line[:3] for line in steps] == [
        [str(row["step"]), f"{row['loss']:.6g}", f"{row['loss_after']:.6g}"] for row in read(Path("run/metrics.jsonl"))
    ]


def test_residuals_of_a_solve_are_relative_to_the_gradient(folder: Path) -> None:
    assert main([*FLAGS, "--run-dir", "run", "--dtype", "float64"]) == 0
    rows, solves = read(Path("run/metrics.jsonl")), read(Path("run/solves.jsonl"))
    for row, solve in zip(rows, solves, strict=True):
        assert solve["right_hand_side_norm"] == row["gradient_norm"]
        assert solve["residual_norm"][0] == pytest.approx(row["gradient_norm"], rel=1e-12)  # it starts at zero
        assert solve["residual_norm"][solve["iterations"]] == row["cg_residual_norm"]
        assert (solve["step"], solve["iterations"], solve["reason"]) == (
            row["step"],
            row["cg_iterations"],
            row["cg_reason"],
        )


@pytest.mark.parametrize(
    ("chosen", "steps"),
    [("auto", [1, 2, 5]), ("none", []), ("3", [3]), ("all", [1, 2, 3, 4, 5, 6]), ("4,2", [2, 4])],
)
def test_chosen_solves_are_recorded_and_survive_a_resume(
    folder: Path, chosen: str, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dhf.run.closing.draw_run", lambda run, path: path)
    flags = ["--problem", "mine.py:build", "--solver", "cg", "--record-solves", chosen]
    assert main([*flags, "--steps", "6", "--run-dir", "whole"]) == 0
    assert [solve["step"] for solve in read(Path("whole/solves.jsonl"))] == steps
    assert main([*flags, "--steps", "3", "--run-dir", "parts"]) == 0
    # as if it had been killed after a step that no checkpoint has
    with Path("parts/solves.jsonl").open("a") as file:
        file.write('{"step": 4, "residual_norm": [1.0]}\n{"step": 5, "resid')
    assert main([*flags, "--steps", "6", "--run-dir", "parts", "--resume", "auto"]) == 0
    assert read(Path("parts/solves.jsonl")) == read(Path("whole/solves.jsonl"))


def test_solves_are_chosen_in_each_phase(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dhf.run.closing.draw_run", lambda run, path: path)
    phases = "[{optimizer: adam, steps: 3}, {optimizer: hf, solver: cg, steps: 5}]"
    assert main(["--problem", "mine.py:build", "--phases", phases, "--run-dir", "run"]) == 0
    assert [solve["step"] for solve in read(Path("run/solves.jsonl"))] == [4, 5, 8]


def test_a_run_is_overwritten_with_all_it_has_recorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dhf.run.closing.draw_run", lambda run, path: path)
    assert main([*FLAGS, "--run-dir", "run"]) == 0
    assert main([*FLAGS[:2], "--optimizer", "adam", "--steps", "1", "--run-dir", "run", "--overwrite"]) == 0
    assert read(Path("run/solves.jsonl")) == []


@pytest.mark.parametrize("steps", ["first", "0", "²", "1,"])
def test_a_solve_that_cannot_be_named_is_refused(folder: Path, capsys: pytest.CaptureFixture[str], steps: str) -> None:
    assert main(["--record-solves", steps]) == 2
    assert capsys.readouterr().err == (
        f"error: --record-solves {steps} is unknown; give auto, all, none, or steps such as 1,5,10\n"
    )


def test_control_characters_of_others_are_told_and_not_sent(capsys: pytest.CaptureFixture[str]) -> None:
    monitor = Monitor(True, "title")
    monitor.say("folder \x1b[31mred\a :smile: λ")
    assert capsys.readouterr().out == "folder \\x1b[31mred\\x07 :smile: λ\n"


def test_a_rank_that_does_not_lead_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    monitor = Monitor(False, "title", iterations=True)
    monitor.start()
    monitor.say("text")
    monitor.iteration(Iteration(1, 1.0, -1.0, 2.0), 1.0)
    monitor.step({}, {})
    monitor.stop()
    assert capsys.readouterr() == ("", "")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4e}"
