"""A checkpoint of four ranks, resumed with one to four: the run that was never stopped."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults.forked import Run, run
from tests.faults.test_lost_ranks import decided

FLAGS = ("--steps", "8", "--batch-size", "18", "--micro-batch-size", "4", "--checkpoint-every", "0")
NUMBERS = ("loss", "loss_after", "gradient_norm", "damping", "reduction_ratio", "step_length")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(4, tmp_path_factory.mktemp("whole"), *FLAGS)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half")
    run(4, folder, *FLAGS, "--steps", "5")
    return folder


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_saved_by_four_ranks_and_resumed_by_others(tmp_path: Path, whole: Run, half: Path, ranks: int) -> None:
    shutil.copytree(half, tmp_path / "again")
    resumed = run(ranks, tmp_path / "again", *FLAGS, "--resume", "auto")
    assert "resumed at step 5 from " in resumed.said(0, "out")
    if ranks == 4:
        assert decided(resumed) == decided(whole)
        return
    assert len(resumed.rows()) == 8
    for row, truth in zip(resumed.rows(), whole.rows(), strict=True):
        for name in NUMBERS:
            assert row[name] == pytest.approx(truth[name], rel=1e-9, abs=1e-12), name
        assert row["cg_iterations"] == truth["cg_iterations"]


def test_settings_that_have_changed_are_said(tmp_path: Path, half: Path) -> None:
    shutil.copytree(half, tmp_path / "again")
    resumed = run(2, tmp_path / "again", *FLAGS, "--resume", "auto", "--cg-max-iterations", "9")
    assert "settings that the checkpoint was not written with: --cg-max-iterations 250 -> 9" in resumed.said(0, "out")


def test_the_newest_whole_checkpoint_is_used_and_the_damaged_one_named(tmp_path: Path, whole: Run) -> None:
    flags = (*FLAGS[2:], "--checkpoint-every", "2")
    run(4, tmp_path / "again", *flags, "--steps", "6")
    damaged = tmp_path / "again" / "run" / "checkpoints" / "step-6" / "state.pt"
    content = bytearray(damaged.read_bytes())
    content[1000] ^= 1
    damaged.write_bytes(content)
    resumed = run(4, tmp_path / "again", *flags, "--steps", "8", "--resume", "auto")
    said = resumed.said(0, "out")
    assert "warning: checkpoint " in said
    assert "step-6 is damaged: state.pt does not have the checksum of its manifest" in said
    assert "resumed at step 4 from " in said
    assert decided(resumed) == decided(whole)


def test_no_whole_checkpoint_at_all(tmp_path: Path) -> None:
    run(2, tmp_path, *FLAGS, "--steps", "2")
    (tmp_path / "run" / "checkpoints" / "step-2" / "manifest.json").write_text("{")
    refused = run(2, tmp_path, *FLAGS, "--resume", "auto", code=2)
    assert "no checkpoint of " in refused.said(0, "err")
    assert "step-2 cannot be read" in refused.said(0, "err")
    assert len(refused.rows()) == 2  # nothing was lost


def test_random_numbers_of_the_users_go_on_where_they_were(tmp_path: Path) -> None:
    """The metric is drawn from torch's, numpy's and Python's global generators."""
    file = tmp_path / "random_metric.py"
    file.write_text(
        "import random, numpy, torch, dhf\n"
        "def build():\n"
        "    x = torch.linspace(-1, 1, 12).view(-1, 1)\n"
        "    objective = dhf.Objective(torch.nn.Linear(1, 1), torch.nn.MSELoss())\n"
        "    def metrics(module):\n"
        "        return {'torch': torch.rand(()).item(), 'numpy': numpy.random.normal(), 'python': random.gauss(0, 1)}\n"
        "    random.seed(3); numpy.random.seed(4)\n"
        "    return dhf.Problem(objective, (x, x**2), metrics=metrics)\n"
    )
    flags = ("--problem", f"{file}:build")
    whole = run(2, tmp_path / "whole", *flags, "--steps", "5")
    run(2, tmp_path / "parts", *flags, "--steps", "2")
    parts = run(2, tmp_path / "parts", *flags, "--steps", "5", "--resume", "auto")
    assert decided(parts) == decided(whole)
