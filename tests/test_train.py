"""python -m dhf.train in one process: what it writes, how it ends, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml

from dhf.train import main

PROBLEM = """
import os, signal
import torch, dhf

def build(samples: int = 12, classes: int = 3, width: int = 5, fault: str = "") -> dhf.Problem:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 4, generator=generator)
    y = torch.randint(0, classes, (samples,), generator=generator)
    module = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, classes))
    loss = torch.nn.CrossEntropyLoss()
    if fault == "hole":
        x[7, 2] = float("nan")
    if fault == "range":
        y[3] = 9
    if fault == "vector":
        loss = lambda outputs, batch: torch.nn.functional.cross_entropy(outputs, batch[1], reduction="none")
    if fault == "infinite":
        loss = lambda outputs, batch: torch.nn.functional.cross_entropy(outputs, batch[1]) + float("inf")
    if fault == "dropout":
        module.append(torch.nn.Dropout(0.5))
    if fault == "raise":
        raise RuntimeError("no such luck")
    if fault == "signal":
        metrics = lambda module: os.kill(os.getpid(), signal.SIGTERM) or {}
    else:
        metrics = lambda module: {"norm": sum(p.square().sum().item() for p in module.parameters())}
    return dhf.Problem(dhf.Objective(module, loss), (x, y), validation=(x[:5], y[:5]), metrics=metrics)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(flag, ...)`` trains in one process and gives the exit code and the run directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    Path("mine.py").write_text(PROBLEM)

    def start(*flags: str, directory: str = "run", problem: str = "mine.py:build") -> tuple[int, Path]:
        code = main(["--problem", problem, "--dtype", "float64", "--run-dir", directory, *flags])
        return code, Path(directory)

    yield start
    torch.set_flush_denormal(False)


def rows(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def result(directory: Path) -> dict:
    return json.loads((directory / "result.json").read_text())


def test_a_run_directory_holds_everything(run, capsys):
    code, directory = run("--steps", "4", "--checkpoint-every", "2")
    assert code == 0
    written = rows(directory)
    assert [row["step"] for row in written] == [1, 2, 3, 4]
    names = (
        "step phase optimizer loss loss_after gradient_norm step_length damping reduction_ratio cg_iterations cg_reason "
        "seconds norm"
    )
    assert set(names.split()) | {"validation_loss"} <= set(written[0])
    end = result(directory)
    assert (end["reason"], end["exit_code"], end["steps"], end["world_size"]) == ("STEPS_DONE", 0, 4, 1)
    assert end["loss"] == written[-1]["loss_after"]
    assert yaml.safe_load((directory / "config.yaml").read_text())["steps"] == 4
    assert (directory / "checkpoints" / "LATEST").read_text().strip() == "step-4"
    assert (directory / "plots" / "run.png").stat().st_size > 1000
    out = capsys.readouterr().out
    summary = [
        line for line in out.splitlines() if line.split(" ")[0] in ("ended", "loss", "time", "products", "written")
    ]
    assert len(summary) == 5
    assert "All steps asked for were taken" in summary[0]


def test_the_metrics_are_those_of_the_parameters_that_were_saved(run):
    """The last loss, validation loss and metric again, from the checkpoint and plain torch."""
    _, directory = run("--steps", "3", "--weight-decay", "0.01")
    state = torch.load(directory / "checkpoints" / "step-3" / "state.pt", weights_only=True)["module"]
    namespace: dict = {}
    exec(PROBLEM, namespace)
    torch.set_default_dtype(torch.float64)  # random numbers differ between dtypes
    try:
        problem = namespace["build"]()
    finally:
        torch.set_default_dtype(torch.float32)
    module = problem.objective.module
    module.load_state_dict(state)
    x, y = problem.train
    norm = float(sum(p.detach().square().sum() for p in module.parameters()))
    last = rows(directory)[-1]
    entropy = float(torch.nn.functional.cross_entropy(module(x), y).detach())
    assert last["loss_after"] == pytest.approx(entropy + 0.005 * norm, rel=1e-12)
    assert last["validation_loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(module(x[:5]), y[:5]).detach()), rel=1e-12
    )
    assert last["norm"] == pytest.approx(norm, rel=1e-12)


def test_a_resumed_run_is_bitwise_the_whole_run(run):
    _, whole = run("--steps", "6", directory="whole")
    run("--steps", "3", directory="parts")
    code, parts = run("--steps", "6", "--resume", "auto", directory="parts")
    assert code == 0
    timing = ("seconds", "own_seconds", "waiting_seconds", "peak_memory_mb")
    strip = lambda row: {k: v for k, v in row.items() if k not in timing}  # noqa: E731
    assert [strip(r) for r in rows(parts)] == [strip(r) for r in rows(whole)]


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_first_order_methods_run_and_resume_alike(run, optimizer):
    _, whole = run("--steps", "4", "--optimizer", optimizer, directory="whole")
    run("--steps", "2", "--optimizer", optimizer, directory="parts")
    _, parts = run("--steps", "4", "--optimizer", optimizer, "--resume", "parts", directory="parts")
    assert [r["loss_after"] for r in rows(parts)] == [r["loss_after"] for r in rows(whole)]
    assert rows(whole)[-1]["loss_after"] < rows(whole)[0]["loss"]


def test_mini_batches_resume_at_the_right_samples(run):
    flags = ("--batch-size", "5", "--micro-batch-size", "2")
    _, whole = run("--steps", "6", *flags, directory="whole")
    run("--steps", "4", *flags, directory="parts")
    _, parts = run("--steps", "6", *flags, "--resume", "auto", directory="parts")
    assert [r["loss"] for r in rows(parts)] == [r["loss"] for r in rows(whole)]


def test_a_target_ends_the_run_and_a_missed_one_can_be_an_error(run):
    code, directory = run("--steps", "50", "--target-loss", "0.5")
    assert (code, result(directory)["reason"]) == (0, "TARGET_REACHED")
    assert rows(directory)[-1]["loss_after"] <= 0.5 < rows(directory)[-1]["loss"]
    code, directory = run("--steps", "1", "--target-loss", "0.0", "--error-if-not-converged", directory="missed")
    assert (code, result(directory)["exit_code"]) == (4, 4)


def test_a_time_budget_ends_the_run_with_a_checkpoint(run):
    code, directory = run("--steps", "100000", "--time-budget", "0.3", "--target-loss", "-1")
    assert (code, result(directory)["reason"]) == (0, "TIME_LIMIT")
    steps = result(directory)["steps"]
    assert (directory / "checkpoints" / "LATEST").read_text().strip() == f"step-{steps}"


def test_a_signal_ends_the_run_with_a_checkpoint_and_75(run):
    before = signal.getsignal(signal.SIGTERM)
    code, directory = run("--steps", "50", "--options.fault", "signal")
    assert code == 75
    assert result(directory)["reason"] == "INTERRUPTED"
    assert result(directory)["steps"] < 3
    assert (directory / "checkpoints" / "LATEST").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_dry_run_prints_sizes_and_writes_nothing(run, capsys):
    code, directory = run("--dry-run", "--micro-batch-size", "5")
    out = capsys.readouterr().out
    assert code == 0
    assert not directory.exists()
    assert "parameters          43 (float64)" in out
    assert "micro-batches       3" in out
    assert "graphs kept         3 of 3; the others are rebuilt for each product" in out
    assert "predicted peak" in out


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--options.fault", "hole"], "sample 7 of the data holds NaN"),
        (["--options.fault", "range"], "target 9 of sample 3 in its micro-batch is out of range"),
        (["--options.fault", "vector"], "the loss must be one number"),
        (["--options.fault", "infinite"], "the loss is inf"),
        (["--options.widht", "3"], "has no option 'widht'; did you mean 'width'?"),
        (["--backend", "nccl"], "--backend nccl needs a GPU per rank: found"),
        (["--backend", "gloo"], "--backend gloo needs ranks: start with torchrun"),
        (["--stesp", "4"], "unknown setting --stesp; did you mean --steps?"),
        (["--resume", "nowhere"], "--resume nowhere: there is no checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_2_and_writes_nothing(run, capsys, flags, text):
    code, directory = run("--steps", "2", *flags)
    err = [line for line in capsys.readouterr().err.splitlines() if line]
    assert code == 2
    assert len(err) == 1
    assert err[0].startswith("error: ")
    assert text in err[0]
    assert not directory.exists()


def test_rank_without_an_address_is_refused(run, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    code, _ = run()
    assert code == 2
    assert "RANK set but WORLD_SIZE, MASTER_ADDR, MASTER_PORT not" in capsys.readouterr().err


def test_a_run_that_is_there_is_neither_overwritten_nor_lost(run, capsys):
    _, directory = run("--steps", "2")
    before = (directory / "metrics.jsonl").read_text()
    code, _ = run("--steps", "2")
    assert code == 2
    assert "already holds a run" in capsys.readouterr().err
    # data that turn out to be unusable must not cost the old run, even where overwriting was asked for
    code, _ = run("--steps", "2", "--overwrite", "--options.fault", "hole")
    assert code == 2
    assert (directory / "metrics.jsonl").read_text() == before
    code, _ = run("--steps", "1", "--overwrite")
    assert code == 0
    assert len(rows(directory)) == 1


def test_a_checkpoint_of_another_model_is_refused(run, capsys):
    _, directory = run("--steps", "1")
    before = (directory / "metrics.jsonl").read_text()
    code, _ = run("--steps", "2", "--resume", "auto", "--options.width", "6")
    assert code == 2
    assert "'0.weight' has shape (5, 4) there and (6, 4) here" in capsys.readouterr().err
    assert (directory / "metrics.jsonl").read_text() == before


def test_an_error_in_the_problem_file_shows_its_traceback_and_ends_with_5(run, capsys):
    code, directory = run("--options.fault", "raise")
    err = capsys.readouterr().err
    assert code == 5
    assert "error: RuntimeError: no such luck" in err
    assert "mine.py" in err
    assert not directory.exists()


def test_the_default_directory_is_new_each_time(run, tmp_path):
    assert main(["--problem", "mine.py:build", "--steps", "1"]) == 0
    (directory,) = Path("runs").iterdir()
    assert directory.name.startswith("mine-")
    assert os.path.exists(directory / "result.json")


def test_what_changes_the_objective_or_nothing_is_told_at_the_start(run, capsys):
    assert run("--steps", "1", "--options.fault", "dropout", "--learning-rate", "0.1")[0] == 0
    out = capsys.readouterr().out
    told = out[: out.index("start: ")]
    assert "warning: dropout is on in submodule '3': its mask is held for a step" in told
    assert "warning: not used by hf: --learning-rate" in told
