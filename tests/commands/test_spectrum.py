"""python -m dhf spectrum against the eigenvalues of dense matrices."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from dhf.__main__ import main
from dhf.estimators import trace
from dhf.run.spectrum import read_spectrum
from tests.commands.problem_file import built, matrix, write_file


@pytest.fixture
def spectrum(tmp_path, monkeypatch):
    """``spectrum(flag, ...)`` runs the command on the problem file; its exit code."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    write_file(tmp_path)
    yield lambda *flags: main(["spectrum", "--problem", "mine.py:build", "--threads", "1", *flags])
    torch.set_flush_denormal(False)


def eigenvalues(curvature: str) -> torch.Tensor:
    """Of the dense matrix, ascending."""
    module, data = built()
    return torch.linalg.eigvalsh(matrix(module, data, "cross_entropy", curvature))


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_both_ends_and_the_trace_are_those_of_the_dense_matrix(spectrum, curvature):
    flags = ("--curvature", curvature, "--largest", "4", "--smallest", "3", "--output", "s.json")
    assert spectrum(*flags, "--micro-batch-size", "5") == 0
    found, truth = json.loads(Path("s.json").read_text()), eigenvalues(curvature)
    assert found["n"] == len(truth) == 26
    scale = float(truth.abs().max())
    assert found["largest"]["values"] == pytest.approx(truth.flip(0)[:4].tolist(), abs=1e-8 * scale)
    assert found["smallest"]["values"] == pytest.approx(truth[:3].tolist(), abs=1e-8 * scale)
    for end, expected in (("largest", truth.flip(0)[:4]), ("smallest", truth[:3])):
        for value, bound, true in zip(
            found[end]["values"], found[end]["residual_norms"], expected.tolist(), strict=True
        ):
            assert abs(value - true) <= bound + 1e-14 * scale
    assert found["eigenvalues"] == [*found["largest"]["values"], *found["smallest"]["values"]]
    # as many products as parameters give the trace itself
    assert found["trace"]["value"] == pytest.approx(float(truth.sum()), rel=1e-10)
    assert found["trace"]["standard_error"] == 0.0


def test_the_density_is_that_of_the_eigenvalues(spectrum, capsys):
    """Lanczos in as many steps as parameters has every eigenvalue; over random vectors its weights are each 1/n on average."""
    flags = ("--density-samples", "64", "--density-steps", "26", "--trace-products", "0", "--largest", "0")
    assert spectrum(*flags, "--output", "s.json") == 0
    found, truth = json.loads(Path("s.json").read_text()), eigenvalues("hessian")
    grid = torch.tensor(found["density"]["grid"], dtype=torch.float64)
    values = torch.tensor(found["density"]["values"], dtype=torch.float64)
    width = found["density"]["width"]
    bells = torch.exp(-0.5 * ((grid[:, None] - truth) / width) ** 2) / (width * (2 * torch.pi) ** 0.5)
    expected = bells.mean(1)
    assert float((values - expected).abs().max()) < 0.1 * float(expected.max())
    assert float(torch.trapezoid(values, grid)) == pytest.approx(1.0, abs=1e-3)
    bars = [line.split() for line in capsys.readouterr().out.splitlines() if " to " in line]
    edges = torch.linspace(float(truth.min()), float(truth.max()), len(bars) + 1, dtype=torch.float64)
    assert len(bars) == 20
    assert sum(float(row[3]) for row in bars) == pytest.approx(26, abs=1.1)
    fullest = max(range(20), key=lambda i: float(bars[i][3]))
    inside = (truth >= edges[fullest] - 1e-9) & (truth <= edges[fullest + 1] + 1e-9)
    assert float(bars[fullest][3]) == pytest.approx(float(inside.sum()), rel=0.25)


def test_the_matrix_of_chosen_parameters_alone(spectrum, capsys):
    assert spectrum("--parameters", "2", "--largest", "10", "--density-samples", "0", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    module, data = built()
    block = matrix(module, data, "cross_entropy", "hessian")[-10:, -10:]
    assert found["n"] == 10
    assert found["eigenvalues"] == pytest.approx(torch.linalg.eigvalsh(block).flip(0).tolist(), abs=1e-9)


def test_the_picture_and_the_file_that_plot_takes(spectrum, capsys):
    pytest.importorskip("matplotlib")
    assert spectrum("--output", "out/s.json", "--picture", "out/s.png", "--density-steps", "20") == 0
    assert Path("out/s.png").read_bytes()[:4] == b"\x89PNG"
    read = read_spectrum("out/s.json")
    assert len(read["eigenvalues"]) == 5
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "written   out/s.json, out/s.png"
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--parameters", "nothing"], "parameters 'nothing' fits the name of no trainable parameter"),
        (["--largest", "-1"], "--largest must not be negative, got -1"),
        (["--tol", "2"], "--tol must be in (0, 1), got 2.0"),
        (["--picture", "s.txt"], "--picture s.txt must end in .png or .svg"),
        (
            ["--picture", "s.png", "--largest", "0", "--density-samples", "0"],
            "--picture has nothing to draw; give --largest",
        ),
        (["--parameters", " , "], "parameters names none; give names or patterns such as 'layers.2.*'"),
        (["--output", "mine.py/s.json"], "cannot be written"),
        (["--output", "s.csv"], "--output s.csv must end in .json"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_2(spectrum, capsys, flags, words):
    assert spectrum(*flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_what_has_not_converged_is_an_error_only_when_asked(spectrum, capsys):
    few = ("--max-products", "3", "--trace-products", "0", "--density-samples", "0")
    assert spectrum(*few) == 0
    assert "largest   iteration limit" in capsys.readouterr().out
    assert spectrum(*few, "--error-if-not-converged") == 4


def test_a_signal_ends_it_with_what_it_has(spectrum, monkeypatch):
    def stopped(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return trace(*args, **options)

    monkeypatch.setattr("dhf.run.eigenvalues.trace", stopped)
    assert spectrum("--largest", "2", "--trace-products", "20", "--output", "s.json") == 75
    found = json.loads(Path("s.json").read_text())
    assert found["largest"]["converged"]
    assert "trace" not in found
    assert "density" not in found
    assert found["products"] < found["largest"]["products"] + 20
