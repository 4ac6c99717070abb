"""python -m dhf solve against dense matrices: what it prints, writes, and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dhf.__main__ import main
from dhf.train import main as train
from tests.commands.problem_file import built, gradient, matrix, write_file


@pytest.fixture
def solve(tmp_path, monkeypatch):
    """``solve(flag, ...)`` runs the command on the problem file; its exit code."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    write_file(tmp_path)
    yield lambda *flags: main(["solve", "--problem", "mine.py:build", *flags])
    torch.set_flush_denormal(False)


def truth(loss: str, curvature: str, damping: float, b: torch.Tensor | None = None) -> torch.Tensor:
    module, data = built(loss=loss)
    A = matrix(module, data, loss, curvature)
    b = gradient(module, data, loss) if b is None else b
    return torch.linalg.solve(A + damping * torch.eye(len(A), dtype=A.dtype), b)


@pytest.mark.parametrize(
    ("solver", "curvature", "loss", "damping"),
    [
        ("cg", "ggn", "cross_entropy", 1e-2),
        ("minres", "hessian", "cross_entropy", 1e-2),
        ("cgls", "ggn", "mse", 1e-3),
        ("direct", "ggn", "cross_entropy", 1e-2),
        ("direct", "ggn", "mse", 1e-3),
    ],
)
def test_solutions_are_those_of_the_dense_system(solve, solver, curvature, loss, damping):
    flags = ("--solver", solver, "--curvature", curvature, "--options.loss", loss, "--damping", str(damping))
    assert solve(*flags, "--cg-rtol", "1e-12", "--output", "sub/x.pt", "--micro-batch-size", "5") == 0
    x = torch.load("sub/x.pt", weights_only=True)
    expected = truth(loss, curvature, damping)
    torch.testing.assert_close(x, expected, rtol=1e-8, atol=1e-8 * float(expected.norm()))
    result = json.loads(Path("sub/x.json").read_text())
    assert result["converged"]
    assert result["solution_norm"] == pytest.approx(float(expected.norm()), rel=1e-8)
    assert [p["name"] for p in result["parameters"]] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert sum(int(np.prod(p["shape"])) for p in result["parameters"]) == len(x)
    assert not list(Path("sub").glob(".*"))


@pytest.mark.parametrize("solver", ["cg", "direct"])
def test_a_right_hand_side_from_a_file(solve, solver):
    b = torch.randn(26, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    np.save("b.npy", b.numpy())
    assert solve("--rhs", "b.npy", "--solver", solver, "--cg-rtol", "1e-12", "--output", "x.npy") == 0
    expected = truth("cross_entropy", "ggn", 1e-3, b)
    np.testing.assert_allclose(np.load("x.npy"), expected.numpy(), rtol=1e-7, atol=1e-8 * float(expected.norm()))


def test_the_report_the_history_and_the_json_agree(solve, capsys):
    assert solve("--history", "--output", "x.pt", "--cg-rtol", "1e-8", "--preconditioner", "jacobi") == 0
    out = capsys.readouterr().out
    written = json.loads(Path("x.json").read_text())
    lines = out.splitlines()
    table = [line.split() for line in lines if line[:9].strip().isdigit()]
    assert [int(row[0]) for row in table] == [row["number"] for row in written["history"]]
    assert len(table) == written["iterations"] + 1
    assert written["history"][0]["residual_norm"] == pytest.approx(written["rhs_norm"], rel=1e-12)
    assert lines[-2] == "reason    residual tolerance: The residual norm fell below the tolerance."
    assert lines[-1] == "written   x.pt, x.json"
    assert "\x1b" not in out
    module, data = built()
    assert written["gradient_norm"] == pytest.approx(float(gradient(module, data, "cross_entropy").norm()), rel=1e-12)
    assert solve("--json", "--cg-rtol", "1e-8", "--preconditioner", "jacobi") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["residual_norm"] == written["residual_norm"]
    assert "history" not in printed


def test_at_a_run_it_solves_at_its_newest_parameters_with_its_problem(solve, capsys):
    flags = ["--problem", "mine.py:build", "--options.width", "5", "--steps", "3", "--run-dir", "run"]
    assert train(flags) == 0
    assert main(["solve", "--at", "run", "--damping", "0.05", "--cg-rtol", "1e-12", "--output", "x.pt"]) == 0
    assert "problem   mine.py:build at step 3 of run, 1 rank(s) over serial" in capsys.readouterr().out
    module, data = built(width=5)
    module.load_state_dict(torch.load("run/checkpoints/step-3/state.pt", weights_only=True)["module"])
    A = matrix(module, data, "cross_entropy", "ggn")
    b = gradient(module, data, "cross_entropy")
    expected = torch.linalg.solve(A + 0.05 * torch.eye(len(A), dtype=A.dtype), b)
    torch.testing.assert_close(torch.load("x.pt", weights_only=True), expected, rtol=1e-8, atol=1e-10)
    assert json.loads(Path("x.json").read_text())["step"] == 3


def test_what_has_not_converged_is_an_error_only_when_asked(solve, capsys):
    few = ("--cg-max-iterations", "2", "--cg-rtol", "1e-10")
    assert solve(*few) == 0
    assert "reason    iteration limit: " in capsys.readouterr().out
    assert solve(*few, "--error-if-not-converged") == 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--solver", "cgls"], "solver cgls needs a sum of squares"),
        (["--solver", "direct", "--curvature", "hessian"], "solver direct works on the Gauss-Newton matrix alone"),
        (["--solver", "cgls", "--options.loss", "mse", "--rhs", "b.npy"], "the objective's own residuals"),
        (["--rhs", "none.npy"], "--rhs none.npy cannot be read: FileNotFoundError"),
        (["--rhs", "short.npy"], "--rhs short.npy must hold floating-point numbers of shape (26,), one per parameter"),
        (["--rhs", "mine.py"], "must be gradient, or a .pt or .npy file with a vector of 26 numbers"),
        (["--at", "nowhere"], "--at nowhere: there is no whole checkpoint"),
        (["--output", "mine.py/x.pt"], "--output mine.py/x.pt cannot be written"),
        (["--options.widht", "3"], "has no option 'widht'; did you mean 'width'?"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_2(solve, capsys, flags, words):
    np.save("short.npy", np.zeros(3))
    assert solve(*flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
