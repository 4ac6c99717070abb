"""python -m dhf plot, compare and export, on runs that were trained for it: files, numbers, refusals in one line."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dhf.commands import compare, export, plot
from dhf.run.compare import OWN_METRICS, differences, levels_of, reached, table
from dhf.run.records import RunRecord, read_runs
from dhf.train import main as train

PROBLEM = """
import torch, dhf

def build(width: int = 5) -> dhf.Problem:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(12, 4, generator=generator), torch.randint(0, 3, (12,), generator=generator)
    module = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 3))

    def pictures(module, folder):
        from matplotlib.figure import Figure

        figure = Figure()
        figure.subplots().plot(module[0].weight.detach().flatten())
        figure.savefig(folder / "weights")
        (folder / "weights.txt").write_text(str(float(module[0].weight.sum())))
        return sorted(folder.glob("weights*"))

    return dhf.Problem(
        dhf.Objective(module, torch.nn.CrossEntropyLoss()),
        (x, y),
        validation=(x[:5], y[:5]),
        metrics=lambda module: {"norm": float(module[0].weight.norm())},
        pictures=pictures,
    )
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a problem and three runs of it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "mine.py").write_text(PROBLEM)
    before = Path.cwd()
    os.chdir(folder)
    try:
        given = ["--problem", "mine.py:build", "--dtype", "float64"]
        for name, flags in {
            "hf": ["--steps", "5", "--solver", "cg", "--profile", "--damping", "0.1"],
            "adam": ["--steps", "40", "--optimizer", "adam", "--learning-rate", "0.02", "--checkpoint-every", "0"],
            "wide": ["--steps", "3", "--options.width", "7", "--solver", "cg", "--damping", "0.1"],
        }.items():
            assert train([*given, *flags, "--run-dir", f"runs/{name}"]) == 0
    finally:
        os.chdir(before)
        torch.set_flush_denormal(False)
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to work in."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"runs/{run}/metrics.jsonl").read_text().splitlines()]


def test_a_run_is_drawn_for_each_ground_and_format(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plot.main(["runs/hf", "--theme", "both", "--format", "both"]) == 0
    told = capsys.readouterr().out.splitlines()
    names = [
        f"{name}{ground}.{kind}"
        for name in ("run", "residuals", "profile", "weights")
        for ground in ("", "-dark")
        for kind in ("png", "svg")
    ]
    assert set(told) >= {f"runs/hf/plots/{name}" for name in names}
    for path in map(Path, told):
        start = {".png": b"\x89PNG", ".svg": b"<?xml", ".txt": b""}[path.suffix]
        assert path.read_bytes().startswith(start)
    assert 'style="fill: #0d1117"' in Path("runs/hf/plots/weights-dark.svg").read_text().replace("; opacity: 1", "")


def test_the_problem_draws_the_model_of_the_checkpoint(here: Path) -> None:
    assert plot.main(["runs/hf", "--output", "out"]) == 0
    state = torch.load(here / "runs/hf/checkpoints/step-5/state.pt", weights_only=True)
    assert float(Path("out/weights.txt").read_text()) == float(state["module"]["0.weight"].sum())
    assert plot.main(["runs/hf", "--output", "without", "--no-problem"]) == 0
    assert not Path("without/weights.png").exists()


def test_several_runs_go_into_a_folder_of_their_own(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plot.main(["runs/hf", "runs/adam", "--theme", "dark"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "plots/comparison-dark.png",
        "plots/residuals-dark.png",
        "plots/profile-dark.png",
    ]


def test_a_run_that_was_killed_is_drawn_as_far_as_it_went(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = here / "runs/hf"
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 0.1, "loss_aft')
    assert plot.main(["runs/hf"]) == 0
    out, err = capsys.readouterr()
    assert "runs/hf/plots/run.png" in out
    assert err == "no pictures of the problem itself: runs/hf has no checkpoint\n"
    assert compare.main(["runs/hf", "runs/adam"]) == 0
    assert "not ended" in capsys.readouterr().out
    assert export.main(["runs/hf", "--output", "-"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_pictures_that_are_not_returned_are_found(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "mine.py").write_text(PROBLEM.replace('return sorted(folder.glob("weights*"))', "return None"))
    assert plot.main(["runs/hf"]) == 0
    out, err = capsys.readouterr()
    assert {"runs/hf/plots/weights.png", "runs/hf/plots/weights.txt"} <= set(out.splitlines())
    assert err == ""


def test_one_rank_alone_reads_runs(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert compare.main(["runs/hf", "runs/adam"]) == 0
    assert export.main(["runs/hf", "--output", "out.csv"]) == 0
    assert capsys.readouterr() == ("", "")
    assert not Path("out.csv").exists()


def test_a_problem_that_is_gone_costs_its_pictures_alone(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "mine.py").unlink()
    assert plot.main(["runs/hf"]) == 0
    out, err = capsys.readouterr()
    assert "runs/hf/plots/run.png" in out
    assert len(err.splitlines()) == 1
    assert err.startswith("no pictures of the problem itself: ")
    assert "mine.py" in err


def test_a_spectrum_is_drawn_alone_or_with_a_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("spectrum.json").write_text(json.dumps({"eigenvalues": [1.0, 2.0, -0.5]}))
    assert plot.main(["--spectrum", "spectrum.json", "--output", "out"]) == 0
    assert capsys.readouterr().out == "out/spectrum.png\n"
    assert plot.main(["runs/adam", "--spectrum", "spectrum.json", "--no-problem"]) == 0
    assert capsys.readouterr().out.splitlines() == ["runs/adam/plots/run.png", "runs/adam/plots/spectrum.png"]


@pytest.mark.parametrize(
    ("command", "flags", "text"),
    [
        (plot, [], "there is nothing to draw; give the directory of a run, or --spectrum FILE"),
        (plot, ["nowhere"], "nowhere does not exist; give the directory of a run"),
        (plot, ["runs"], "runs holds no run: there is no metrics.jsonl in it; give what --run-dir was"),
        (plot, ["runs/hf", "--theme", "grey"], "--theme 'grey' is unknown; choose from light, dark, both"),
        (plot, ["runs/hf", "--solvs", "1"], "unknown setting --solvs; did you mean --solves?"),
        (plot, ["runs/hf", "--solves", "one"], "--solves must be steps such as 1,5,10, got 'one'"),
        (plot, ["runs/hf", "--solves", "²"], "--solves must be steps such as 1,5,10, got '²'"),
        (plot, ["runs/hf", "--solves", "4"], "the solve of step 4 was not recorded; train with --record-solves 4"),
        (plot, ["runs/hf", "--spectrum", "runs"], "runs cannot be read: Is a directory"),
        (plot, ["runs/hf", "--output", "mine.py"], "mine.py cannot be made: File exists; give another --output"),
        (compare, ["runs/hf"], "a comparison needs two runs; python -m dhf plot draws a single one"),
        (compare, ["runs/hf", "mine.py"], "mine.py holds no run"),
        (compare, ["runs/hf", "runs/adam", "--losses", "1,x"], "--losses must be numbers such as 20,15, got '1,x'"),
        (export, [], "there is nothing to export; give the directory of a run"),
        (export, ["runs/hf", "runs/adam", "--output", "x.csv"], "--output is for one run"),
        (export, ["runs/hf", "--output", "no/such/x.csv"], "no/such/x.csv cannot be written: No such file"),
        (export, ["runs/adam", "--solves"], "runs/adam has recorded no solve; train with --record-solves all"),
        (export, ["runs/hf", "--to", "tensorboard", "--solves"], "--to tensorboard writes a folder of events"),
    ],
)
def test_bad_calls_are_one_line_and_2(
    here: Path, capsys: pytest.CaptureFixture[str], command: Any, flags: list[str], text: str
) -> None:
    assert command.main(flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert text in err


@pytest.mark.parametrize("name", ["plot", "compare", "export"])
def test_help_has_examples_and_imports_neither_torch_nor_matplotlib(name: str) -> None:
    code = f"""
import sys
from dhf.commands import {name}
try:
    {name}.main(["--help"])
except SystemExit as end:
    print("\\n", end.code, sorted({{"torch", "matplotlib", "numpy"}} & set(sys.modules)))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert out.splitlines()[-1].split() == ["0", "[]"]
    assert out.count(f"python -m dhf {name} runs/") >= 3


def test_csv_reads_back_as_the_metrics(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main(["runs/hf", "runs/adam"]) == 0
    assert capsys.readouterr().out == "runs/hf/metrics.csv\nruns/adam/metrics.csv\n"
    for run in ("hf", "adam"):
        with Path(f"runs/{run}/metrics.csv").open(newline="") as file:
            read = list(csv.DictReader(file))
        written = rows(run)
        assert len(read) == len(written)
        for cells, row in zip(read, written, strict=True):
            for name, value in row.items():
                if isinstance(value, (int, float)):
                    assert float(cells[name]) == value  # to the last bit
                elif value is None or isinstance(value, str):
                    assert cells[name] == (value or "")
            for i, seconds in enumerate(row["own_seconds"]):
                assert float(cells[f"own_seconds.{i}"]) == seconds
            for phase, (seconds,) in row.get("phase_seconds", {}).items():
                assert float(cells[f"phase_seconds.{phase}.0"]) == seconds


def test_a_reader_that_has_seen_enough_is_no_error(here: Path) -> None:
    line = Path("runs/adam/metrics.jsonl").read_text().splitlines()[0]
    Path("runs/adam/metrics.jsonl").write_text((line + "\n") * 5000)  # more than a pipe holds
    command = [sys.executable, "-m", "dhf.commands.export", "runs/adam", "--output", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith(b"step,phase,")
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_csv_of_solves_has_a_line_per_iteration(here: Path) -> None:
    assert export.main(["runs/hf", "--solves", "--output", "solves.csv"]) == 0
    with Path("solves.csv").open(newline="") as file:
        read = [{k: float(v) if v else math.nan for k, v in cells.items()} for cells in csv.DictReader(file)]
    solves = [json.loads(line) for line in Path("runs/hf/solves.jsonl").read_text().splitlines()]
    expected = [(s["step"], k, r) for s in solves for k, r in zip(s["iteration"], s["residual_norm"], strict=True)]
    assert [(r["step"], r["iteration"], r["residual_norm"]) for r in read] == expected


def record(name: str, losses: list[float], **config: Any) -> RunRecord:
    made = [
        {"step": i, "loss": 9.0, "loss_after": loss, "seconds": 0.5, "gradient_equivalents": 4.0, "products": 3}
        for i, loss in enumerate(losses, 1)
    ]
    return RunRecord(Path(name), name, config, made, None, [])


def cells(text: str, name: str) -> list[str]:
    """The words of the first line of a table with this name."""
    line = next(line for line in text.splitlines() if line.strip().startswith(name))
    return line.strip()[len(name) :].split()


def test_a_table_tells_what_it_cost_to_reach_a_loss() -> None:
    fast, slow = record("fast", [4.0, 2.0, 3.0]), record("slow", [8.0, 6.0, 4.0, 3.5])
    assert reached(fast, 4.0) == 0
    assert reached(fast, 1.0) is None
    assert levels_of([fast, slow]) == [3.5, 2.0]
    assert levels_of([fast, record("rounded", [2.0000000001])]) == [2.0000000001]
    text = table([fast, slow], [4.0])
    assert cells(text, "seconds in steps") == ["1.5", "2"]
    assert cells(text, "least loss") == ["2", "3.5"]
    assert cells(text, "products") == ["9", "12"]
    below = text[text.index("to a loss of 4") :]
    assert cells(below, "seconds") == ["0.5", "1.5"]
    assert cells(below, "steps") == ["1", "3"]
    assert cells(below, "gradient equivalents") == ["4.0", "12.0"]
    by_default = table([fast, slow])
    last = by_default[by_default.index("to a loss of 2") :]
    assert cells(last, "seconds") == ["1", "-"]


def test_settings_that_differ_are_those_of_the_computation() -> None:
    one = record("one", [1.0], damping=None, seed=0, options={"width": 5}, run_dir="one", monitor="cg")
    two = record("two", [1.0], damping=0.1, seed=0, options={"width": 7, "depth": 2}, run_dir="two", monitor="steps")
    assert differences([one, two]) == {
        "damping": ["-", "0.1"],
        "options.width": ["5", "7"],
        "options.depth": ["-", "2"],
    }
    assert differences([record("untold", [1.0]), one]) == {}


def test_compare_prints_the_table_and_draws(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["runs/hf", "runs/adam", "runs/wide", "--output", "out", "--format", "svg"]) == 0
    out = capsys.readouterr().out
    runs = read_runs(["runs/hf", "runs/adam", "runs/wide"])
    assert cells(out, "run ") == ["hf", "adam", "wide"]
    assert cells(out, "optimizer")[:3] == ["hf", "adam", "hf"]
    assert cells(out, "ranks") == ["1", "1", "1"]
    assert cells(out, "loss at last") == [f"{run.rows[-1]['loss_after']:.6g}" for run in runs]
    assert cells(out, "norm") == [f"{run.rows[-1]['norm']:.6g}" for run in runs]
    assert cells(out, "validation_loss") == [f"{run.rows[-1]['validation_loss']:.6g}" for run in runs]
    for level in levels_of(runs):
        below = out[out.index(f"to a loss of {level:.6g}") :].splitlines()[1:4]
        for i, run in enumerate(runs):
            at = reached(run, level)
            shown = [line.split()[-3:][i] for line in below]
            if at is None:
                assert shown == ["-", "-", "-"]
            else:
                cost = sum(row["gradient_equivalents"] for row in run.rows[: at + 1])
                assert shown[1:] == [str(at + 1), f"{cost:,.1f}"]
    assert cells(out, "options.width") == ["-", "-", "7"]
    assert out.splitlines()[-3:] == ["out/comparison.svg", "out/residuals.svg", "out/profile.svg"]


def test_what_dhf_itself_reports_is_told_from_the_problem_s_own(here: Path) -> None:
    assert {name for row in rows("hf") for name in row} - set(OWN_METRICS) == {"norm", "validation_loss"}


def test_settings_read_back_are_those_of_the_run(here: Path) -> None:
    (run,) = read_runs(["runs/hf"])
    assert run.config == yaml.safe_load(Path("runs/hf/config.yaml").read_text())
    assert run.result is not None
    assert run.result["reason"] == "STEPS_DONE"


def without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else find(name, *rest)
    )


def test_events_that_cannot_be_written_are_an_error_in_words(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dhf.run.events.Events", full)
    assert export.main(["runs/hf", "--to", "tensorboard", "--output", "events"]) == 2
    assert capsys.readouterr().err == "error: events cannot be written: No space left on device\n"


def test_without_tensorboard_it_is_said_how_to_get_it(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_tensorboard(monkeypatch)
    expected = "error: events for TensorBoard need the package tensorboard; pip install 'dhf[tensorboard]'\n"
    assert train(["--problem", "mine.py:build", "--steps", "1", "--tensorboard", "--run-dir", "new"]) == 2
    assert capsys.readouterr().err == expected
    assert not Path("new").exists()
    assert export.main(["runs/hf", "--to", "tensorboard"]) == 2
    assert capsys.readouterr().err == expected


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the package tensorboard"
    )
    found = accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_events_hold_the_numbers_of_the_metrics(here: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    flags = ["--problem", "mine.py:build", "--solver", "cg", "--tensorboard", "--run-dir", "live", "--profile"]
    assert train([*flags, "--steps", "3"]) == 0
    assert train([*flags, "--steps", "5", "--resume", "auto"]) == 0
    written = [json.loads(line) for line in Path("live/metrics.jsonl").read_text().splitlines()]
    assert export.main(["live", "--to", "tensorboard", "--output", "exported"]) == 0
    for folder in ("live/tensorboard", "exported"):
        found = scalars(Path(folder))
        for name in ("loss", "loss_after", "damping", "cg_iterations", "validation_loss", "norm"):
            assert [step for step, _ in found[name]] == [1, 2, 3, 4, 5]
            values = [value for _, value in found[name]]
            assert values == pytest.approx([row[name] for row in written], rel=1e-6)
        values = [value for _, value in found["phase_seconds/graphs/0"]]
        assert values == pytest.approx([row["phase_seconds"]["graphs"][0] for row in written], rel=1e-6)
    assert export.main(["live", "--to", "tensorboard"]) == 2  # they are there
