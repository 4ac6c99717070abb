"""Checkpoints and run directories on disk."""

import json

import pytest
import torch
from torch import nn

from dhf.errors import UsageError
from dhf.run import checkpoint
from dhf.run.directory import RunDirectory


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    state = {"module": nn.Linear(2, 3).state_dict(), "step": 4, "optimizer": {"damping": 0.1, "last": None}}
    path = checkpoint.save(tmp_path, 4, state)
    back = checkpoint.load(path)
    assert back["optimizer"] == state["optimizer"]
    assert torch.equal(back["module"]["weight"], state["module"]["weight"])
    assert checkpoint.find(tmp_path) == path
    assert checkpoint.find(path) == path


def test_the_newest_three_are_kept_and_no_temporary_is_left(tmp_path):
    for step in (1, 2, 10, 20):
        checkpoint.save(tmp_path, step, {"step": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-10", "step-2", "step-20"]
    assert checkpoint.load(checkpoint.find(tmp_path))["step"] == 20


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"x": torch.zeros(100)})
    content = bytearray((path / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "state.pt").write_bytes(content)
    with pytest.raises(UsageError, match="damaged"):
        checkpoint.load(path)


class _Code:
    def __reduce__(self):
        return print, ("code was run",)


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    path = checkpoint.save(tmp_path, 1, {"x": _Code()})
    with pytest.raises(Exception, match=r"[Ww]eights.only|Unsupported"):
        checkpoint.load(path)
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (nn.Linear(2, 4), r"'weight' has shape \(3, 2\) there and \(4, 2\) here"),
        (nn.Linear(2, 3, bias=False), "'bias' is only in the checkpoint"),
        (nn.Sequential(nn.Linear(2, 3)), "'0.weight' is only in the model"),
    ],
)
def test_a_checkpoint_of_another_model_names_the_first_difference(tmp_path, other, text):
    with pytest.raises(UsageError, match=text):
        checkpoint.load_module(other, nn.Linear(2, 3).state_dict(), tmp_path)


def test_a_directory_with_a_run_is_not_taken(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.check_free()
    run.claim("steps: 1\n", resumed_step=None)
    with pytest.raises(UsageError, match="already holds a run; use --resume auto"):
        run.check_free()


def test_a_resumed_run_drops_the_metrics_past_its_step_and_a_line_cut_short(tmp_path):
    run = RunDirectory(tmp_path)
    run.claim("", resumed_step=None)
    for step in range(1, 6):
        run.append({"step": step, "loss": 1.0 / step, "ratio": float("nan")})
    with run.metrics.open("a") as file:
        file.write('{"step": 6, "lo')
    run.claim("", resumed_step=3)
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["ratio"] is None


def test_overwriting_leaves_files_of_others_alone(tmp_path):
    run = RunDirectory(tmp_path)
    run.claim("", resumed_step=None)
    (tmp_path / "notes.txt").write_text("mine")
    run.append({"step": 1})
    run.claim("", resumed_step=None)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert run.metrics.read_text() == ""
