"""Phases: optimizers one after another in one run; what resumes, what ends them, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dhf.run import checkpoint
from dhf.run.plot import draw_run
from dhf.run.records import read_run
from dhf.train import main
from tests.faults import forked
from tests.faults.test_lost_ranks import FREE, decided

PROBLEM = """
import torch, dhf

def build() -> dhf.Problem:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 4, generator=generator)
    y = torch.randint(0, 3, (24,), generator=generator)
    module = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    objective = dhf.Objective(module, torch.nn.CrossEntropyLoss(), weight_decay=1e-3)
    return dhf.Problem(objective, (x, y), validation=(x[:7], y[:7]), metrics=lambda module: {"drawn": torch.rand(()).item()})
"""

ADAM = {"optimizer": "adam", "steps": 3, "learning_rate": 0.02, "batch_size": 10, "micro_batch_size": 4}
LBFGS = {"optimizer": "lbfgs", "steps": 2}
HF = {"optimizer": "hf", "steps": 3, "curvature": "ggn", "preconditioner": "jacobi", "solver": "cg"}
ENDLESS = {"optimizer": "adam", "steps": 10**6, "time_budget": 0.2}

Start = Callable[..., tuple[int, Path]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """``run(phases, flag, ...)`` trains in one process and gives the exit code and the run directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dhf.run.closing.draw_run", lambda run, path: path)  # drawing takes longer than the runs
    Path("mine.py").write_text(PROBLEM)

    def start(phases: list[dict[str, Any]], *flags: str, directory: str = "run") -> tuple[int, Path]:
        Path("phases.yaml").write_text(
            yaml.safe_dump({"problem": "mine.py:build", "dtype": "float64", "phases": phases})
        )
        return main(["--config", "phases.yaml", "--run-dir", directory, *flags]), Path(directory)

    yield start
    torch.set_flush_denormal(False)


def rows(directory: Path) -> list[dict[str, Any]]:
    """The metrics without clocks."""
    read = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in FREE} for row in read]


def reason(directory: Path) -> str:
    return json.loads((directory / "result.json").read_text())["reason"]


def test_phases_follow_one_another_in_one_run(run: Start, capsys: pytest.CaptureFixture[str]) -> None:
    code, directory = run([ADAM, LBFGS, HF])
    assert (code, reason(directory)) == (0, "STEPS_DONE")
    written = rows(directory)
    assert [(row["step"], row["phase"], row["optimizer"]) for row in written] == [
        *((step, 1, "adam") for step in (1, 2, 3)),
        *((step, 2, "lbfgs") for step in (4, 5)),
        *((step, 3, "hf") for step in (6, 7, 8)),
    ]
    assert written[5]["loss"] == pytest.approx(written[4]["loss_after"], rel=1e-12)  # both on all samples
    assert [row["cg_iterations"] > 0 for row in written] == [False] * 5 + [True] * 3
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("phase ")]
    assert said == [
        "phase 1 of 3: adam, 3 steps, batch 10",
        "phase 2 of 3: lbfgs, 2 steps, batch 24",
        "phase 3 of 3: hf, 3 steps, batch 24",
    ]
    assert draw_run(read_run(directory), directory / "run.png").stat().st_size > 1000
    assert yaml.safe_load((directory / "config.yaml").read_text())["phases"] == [ADAM, LBFGS, HF]
    assert main(["--config", str(directory / "config.yaml"), "--run-dir", "again"]) == 0
    assert rows(Path("again")) == written


def test_what_a_phase_leaves_out_is_what_stands_outside(run: Start) -> None:
    _, inside = run([{**HF, "batch_size": 10}, ADAM])
    given = ["--batch-size", "10", "--preconditioner", "jacobi", "--solver", "cg", "--curvature", "ggn"]
    _, outside = run([{"steps": 3}, ADAM], *given, directory="outside")
    assert rows(outside) == rows(inside)


def test_a_resumed_run_is_bitwise_the_whole_run_within_phases_and_between(run: Start) -> None:
    phases = [ADAM, HF, {**LBFGS, "batch_size": 10}]
    _, whole = run(phases, directory="whole")
    for steps in (2, 3, 5, 6, 7):
        run(phases, "--steps", str(steps), directory=f"parts-{steps}")
        code, parts = run(phases, "--resume", "auto", directory=f"parts-{steps}")
        assert code == 0
        assert rows(parts) == rows(whole), steps


def test_a_run_without_phases_goes_on_with_them(run: Start, capsys: pytest.CaptureFixture[str]) -> None:
    _, whole = run([ADAM, HF], directory="whole")
    flags = [text for key, value in ADAM.items() for text in ("--" + key.replace("_", "-"), str(value))]
    run([], *flags, directory="parts")
    _, parts = run([ADAM, HF], "--resume", "auto", directory="parts")
    assert rows(parts) == rows(whole)
    assert "phase 2 of 2: hf, 3 steps, batch 24" in capsys.readouterr().out


def test_a_phase_without_steps_is_passed_over(run: Start) -> None:
    _, directory = run([{**ADAM, "steps": 0}, HF, {**LBFGS, "steps": 0}])
    assert reason(directory) == "STEPS_DONE"
    assert {row["phase"] for row in rows(directory)} == {2}


def test_steps_cut_the_phases_short(run: Start, capsys: pytest.CaptureFixture[str]) -> None:
    _, directory = run([ADAM, HF], "--steps", "4")
    assert (reason(directory), len(rows(directory))) == ("STEPS_DONE", 4)
    assert "phase 2 of 2: hf, 1 of 3 steps, batch 24" in capsys.readouterr().out


def test_a_target_ends_the_whole_run(run: Start) -> None:
    _, directory = run([ADAM, HF], "--target-loss", "100")
    assert (reason(directory), len(rows(directory))) == ("TARGET_REACHED", 1)


def test_a_phase_ends_with_its_time_and_resumes_within_the_next(run: Start, capsys: pytest.CaptureFixture[str]) -> None:
    code, whole = run([ENDLESS, HF], "--checkpoint-every", "1", directory="whole")
    assert (code, reason(whole)) == (0, "STEPS_DONE")
    written = rows(whole)
    first = sum(row["phase"] == 1 for row in written)
    assert 0 < first == len(written) - 3
    assert f"phase 2 of 2: hf, 3 steps, batch 24 (phase 1: out of time after {first} steps)" in capsys.readouterr().out
    place = str(whole / "checkpoints" / f"step-{first + 1}")
    _, parts = run([ENDLESS, HF], "--resume", place, directory="parts")
    assert rows(parts) == written[first + 1 :]


def test_a_phase_goes_on_with_the_time_it_has_left(run: Start) -> None:
    phases = [{**ENDLESS, "time_budget": 100.0}, HF]
    _, directory = run(phases, "--steps", "2")
    (path, content), _ = checkpoint.find(directory)
    state = checkpoint.decode(content)
    assert 0 < state["progress"]["phase_seconds"] < 100
    shutil.rmtree(path)
    state["progress"]["phase_seconds"] = 100.0  # it was stopped at the very end of its time
    checkpoint.save(path.parent, 2, state)
    run(phases, "--resume", "auto")
    assert [row["phase"] for row in rows(directory)] == [1, 1, 2, 2, 2]


def test_the_last_phase_out_of_time_is_the_end(run: Start) -> None:
    code, directory = run([HF, ENDLESS], "--checkpoint-every", "0")
    assert (code, reason(directory)) == (0, "TIME_LIMIT")
    before = rows(directory)
    run([HF, ENDLESS], "--resume", "auto")
    assert reason(directory) == "TIME_LIMIT"
    assert rows(directory) == before


def test_the_runs_time_ends_it_within_a_phase(run: Start) -> None:
    code, directory = run([{**ENDLESS, "time_budget": 60.0}, HF], "--time-budget", "0.1")
    assert (code, reason(directory)) == (0, "TIME_LIMIT")
    assert {row["phase"] for row in rows(directory)} == {1}


def test_a_dry_run_tells_of_each_phase(run: Start, capsys: pytest.CaptureFixture[str]) -> None:
    code, directory = run([ADAM, HF], "--dry-run")
    out = capsys.readouterr().out
    assert code == 0
    assert not directory.exists()
    assert out.index("phase 1 of 2") < out.index("samples per step    10 of 24") < out.index("phase 2 of 2")
    assert out.index("products per step   none") < out.index("phase 2 of 2") < out.index("products per step   at most")


@pytest.mark.parametrize(
    ("phases", "text"),
    [
        ([HF, {**ADAM, "learning_rat": 1.0}], "phase 2: unknown setting learning_rat; did you mean learning_rate?"),
        ([HF, {**ADAM, "xyzzy": 1.0}], "phase 2: unknown setting xyzzy; a phase may have optimizer, steps, "),
        ([{**HF, "seed": 1}], "phase 1: seed holds for the whole run; give it outside the phases"),
        ([HF, {"optimizer": "adam"}], "phase 2 has no steps"),
        ([HF, "adam"], "phase 2 must be a mapping such as {optimizer: adam, steps: 200}, got 'adam'"),
        ([HF, {**HF, "steps": -1}], "phase 2: --steps must not be negative, got -1"),
        ([HF, {**HF, "steps": "many"}], "phase 2: --steps must be an integer, got 'many'"),
        ([{**HF, "optimizer": "sgd"}], "phase 1: --optimizer 'sgd' is unknown; choose from hf, lbfgs, adam"),
        ([{**HF, "time_budget": 0}], "phase 1: --time-budget must be positive and finite"),
        ([ADAM, {**HF, "solver": "cgls"}], "phase 2: solver cgls needs a sum of squares"),
        ([{**HF, "solver": "cgls"}, ADAM], "phase 1: solver cgls needs a sum of squares"),
        ({"steps": 3}, "--phases must be a list"),
    ],
)
def test_bad_phases_are_one_line_and_2(
    run: Start, capsys: pytest.CaptureFixture[str], phases: list[dict[str, Any]], text: str
) -> None:
    code, directory = run(phases)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert code == 2
    assert line.startswith(f"error: {text}")
    assert not directory.exists()


def test_more_steps_than_the_phases_have_are_refused(run: Start, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([ADAM, HF], "--steps", "7")[0] == 2
    assert "--steps 7 is more than the 6 steps of all phases" in capsys.readouterr().err


def test_phases_on_the_command_line(run: Start) -> None:
    run([ADAM, HF])
    assert run([], "--phases", json.dumps([ADAM, HF]), directory="again")[0] == 0
    assert rows(Path("again")) == rows(Path("run"))


def test_a_resume_with_other_phases_says_so_or_is_refused(run: Start, capsys: pytest.CaptureFixture[str]) -> None:
    _, directory = run([ADAM, HF], "--steps", "4")
    before = rows(directory)
    for phases, text in (
        ([ADAM], "the checkpoint was written in phase 2, and this run has 1; give the phases that it was written with"),
        ([ADAM, LBFGS], "was written with --optimizer hf, not lbfgs"),
    ):
        assert run(phases, "--resume", "auto")[0] == 2
        assert text in capsys.readouterr().err
    assert rows(directory) == before
    assert run([ADAM, {**HF, "steps": 4}], "--resume", "auto")[0] == 0
    assert "settings that the checkpoint was not written with: --phases [" in capsys.readouterr().out
    assert len(rows(directory)) == 7


def flags(*phases: dict[str, Any]) -> tuple[str, ...]:
    return "--phases", json.dumps(phases)


def test_two_ranks_take_the_steps_of_one(tmp_path: Path) -> None:
    one, two = (forked.run(size, tmp_path / str(size), *flags(ADAM, LBFGS, HF)) for size in (1, 2))
    assert len(one.rows()) == len(two.rows()) == 8
    for row, truth in zip(two.rows(), one.rows(), strict=True):
        assert (row["phase"], row["optimizer"]) == (truth["phase"], truth["optimizer"])
        for name in ("loss", "loss_after", "gradient_norm"):
            assert row[name] == pytest.approx(truth[name], rel=1e-8), name


def test_two_ranks_resume_bitwise(tmp_path: Path) -> None:
    whole = forked.run(2, tmp_path / "whole", *flags(ADAM, HF))
    for steps in ("3", "5"):
        parts = forked.run(2, tmp_path / steps, *flags(ADAM, HF), "--steps", steps)
        parts = forked.run(2, tmp_path / steps, *flags(ADAM, HF), "--resume", "auto")
        assert decided(parts) == decided(whole)


def test_two_ranks_leave_a_phase_together_when_its_time_is_over(tmp_path: Path) -> None:
    slow = ("--options.pause", "0.01")
    ended = forked.run(2, tmp_path, *flags(ENDLESS, {**HF, "steps": 10**6, "time_budget": 0.2}, LBFGS), *slow)
    assert ended.result()["reason"] == "STEPS_DONE"
    phases = [row["phase"] for row in ended.rows()]
    assert phases == sorted(phases)
    assert phases.count(3) == 2
