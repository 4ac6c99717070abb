"""python -m dhf influence against solves with dense matrices and gradients of single samples."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dhf.__main__ import main
from dhf.train import main as train
from tests.commands.problem_file import built, gradient, matrix, write_file

DAMPING = 0.05


@pytest.fixture
def influence(tmp_path, monkeypatch):
    """``influence(flag, ...)`` runs the command; its exit code."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    write_file(tmp_path)
    settings = ("--damping", str(DAMPING), "--cg-rtol", "1e-12", "--threads", "1")
    yield lambda *flags: main(["influence", *settings, *flags])
    torch.set_flush_denormal(False)


def dense_scores(module: torch.nn.Module, data, queries, curvature: str = "ggn") -> np.ndarray:
    """``1/N ∇ℓ_i · (A + μI)⁻¹ ∇ℓ_q``, shape (queries, samples)."""
    A = matrix(module, data, "cross_entropy", curvature)

    def rows(x, y):
        return torch.stack([gradient(module, (x[i : i + 1], y[i : i + 1]), "cross_entropy") for i in range(len(x))])

    solved = torch.linalg.solve(A + DAMPING * torch.eye(len(A), dtype=A.dtype), rows(*queries).T)
    return (rows(*data) @ solved).T.numpy() / len(data[0])


def held_out(data):
    """As the problem file makes them."""
    return data[0][:4] + 0.5, data[1][:4]


@pytest.mark.parametrize(
    ("curvature", "form"), [("ggn", "tensors"), ("hessian", "tensors"), ("ggn", "loader"), ("ggn", "list")]
)
def test_scores_are_those_of_dense_solves(influence, curvature, form):
    flags = ["--problem", "mine.py:build", "--queries", "0,2-3", "--curvature", curvature, "--options.form", form]
    flags += ["--micro-batch-size", "5"] if form == "tensors" else []
    assert influence(*flags, "--output", "scores.npy") == 0
    module, data = built()
    truth = dense_scores(module, data, [t[[0, 2, 3]] for t in held_out(data)], curvature)
    found = np.load("scores.npy")
    assert found.shape == (3, 13)
    np.testing.assert_allclose(found, truth, rtol=1e-7, atol=1e-9 * np.abs(truth).max())


def test_the_strongest_are_listed_by_their_number_in_the_data(influence, capsys):
    flags = ("--problem", "mine.py:build", "--queries", "1", "--queries-from", "train", "--top", "3")
    assert influence(*flags, "--output", "s.json") == 0
    out = capsys.readouterr().out
    assert influence(*flags, "--output", "s.csv") == 0
    module, data = built()
    truth = dense_scores(module, data, [t[1:2] for t in data])[0]
    helpful = [i for i in np.argsort(-truth)[:3] if truth[i] > 0]
    harmful = [i for i in np.argsort(truth)[:3] if truth[i] < 0]
    (row,) = json.loads(Path("s.json").read_text())["queries"]
    for kind, expected in (("helpful", helpful), ("harmful", harmful)):
        assert [found["sample"] for found in row[kind]] == [int(i) for i in expected]
        assert [found["score"] for found in row[kind]] == pytest.approx([truth[i] for i in expected], rel=1e-7)
        line = next(line for line in out.splitlines() if line.strip().startswith(kind))
        assert [int(part.split()[0]) for part in line.strip().removeprefix(kind).split(",")] == [
            int(i) for i in expected
        ]
    with Path("s.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(r["kind"], int(r["sample"])) for r in table] == [("helpful", int(i)) for i in helpful] + [
        ("harmful", int(i)) for i in harmful
    ]
    loss = torch.nn.functional.cross_entropy(module(data[0][1:2]), data[1][1:2])
    assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-12)


def test_at_a_run_and_in_chosen_parameters(influence, capsys):
    assert train(["--problem", "mine.py:build", "--steps", "2", "--run-dir", "run"]) == 0
    assert influence("--at", "run", "--queries", "0", "--parameters", "2", "--output", "s.npy") == 0
    assert "problem   mine.py:build at step 2 of run, 1 rank(s) over serial" in capsys.readouterr().out
    module, data = built()
    module.load_state_dict(torch.load("run/checkpoints/step-2/state.pt", weights_only=True)["module"])
    module[0].requires_grad_(False)

    def rows(x, y):
        parts = []
        for i in range(len(x)):
            value = torch.nn.functional.cross_entropy(module(x[i : i + 1]), y[i : i + 1])
            grads = torch.autograd.grad(value, list(module[2].parameters()))
            parts.append(torch.cat([g.reshape(-1) for g in grads]))
        return torch.stack(parts)

    A = matrix(module, data, "cross_entropy", "ggn")
    assert len(A) == 10
    query = rows(*(t[:1] for t in held_out(data)))
    truth = rows(*data) @ torch.linalg.solve(A + DAMPING * torch.eye(10, dtype=A.dtype), query.T) / 13
    np.testing.assert_allclose(np.load("s.npy"), truth.T.numpy(), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--queries", "4"], "--queries 4: there are 4 samples, 0 to 3"),
        (["--queries", "a"], "--queries must be numbers of samples such as 0,5,10-14, got 'a'"),
        (["--queries", "3-1"], "--queries 3-1 counts down; give 1-3"),
        (["--output", "s.txt"], "--output s.txt must end in .json, .csv or .npy"),
        (["--batch-size", "5"], "unknown setting --batch-size"),
        (["--top", "0"], "--top must be at least 1"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_2(influence, capsys, flags, words):
    assert influence("--problem", "mine.py:build", *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
