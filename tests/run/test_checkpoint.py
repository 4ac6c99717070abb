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
    back = checkpoint.decode(checkpoint.read(path))
    assert back["optimizer"] == state["optimizer"]
    assert torch.equal(back["module"]["weight"], state["module"]["weight"])
    for place in (tmp_path, path):
        found, damaged = checkpoint.find(place)
        assert (found[0], damaged) == (path, [])
        assert found[1] == checkpoint.read(path)


def test_the_newest_three_are_kept_and_no_temporary_is_left(tmp_path):
    for step in (1, 2, 10, 20):
        checkpoint.save(tmp_path, step, {"step": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-10", "step-2", "step-20"]
    (path, content), _ = checkpoint.find(tmp_path)
    assert (path.name, checkpoint.decode(content)["step"]) == ("step-20", 20)


def test_as_many_are_kept_as_asked_for(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"step": step}, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-3"]


def test_what_a_killed_process_left_is_swept_away(tmp_path):
    (tmp_path / ".step-3.999").mkdir()
    (tmp_path / ".step-3.999" / "state.pt").write_bytes(b"half")
    (tmp_path / ".LATEST.999").write_text("step-3")
    checkpoint.save(tmp_path, 4, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-4"]


def test_a_step_that_is_there_and_whole_is_not_written_again(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"value": 1})
    checkpoint.save(tmp_path, 1, {"value": 2})
    assert checkpoint.decode(checkpoint.read(path))["value"] == 1
    (path / "state.pt").write_bytes(b"damaged")
    checkpoint.save(tmp_path, 1, {"value": 3})
    assert checkpoint.decode(checkpoint.read(path))["value"] == 3


def test_going_back_to_a_step_leaves_the_later_ones_behind(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"step": step})
    assert checkpoint.forget_after(tmp_path, 1) == ["step-2", "step-3"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-1"]
    assert checkpoint.find(tmp_path)[0][0].name == "step-1"


@pytest.mark.parametrize("latest", ["step-9\n", "", "../elsewhere", "\0"])
def test_a_latest_that_names_nothing_is_passed_over(tmp_path, latest):
    checkpoint.save(tmp_path, 1, {"step": 1})
    (tmp_path / "LATEST").write_text(latest)
    assert checkpoint.find(tmp_path)[0][0].name == "step-1"


def flip_a_bit(path):
    content = bytearray((path / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "state.pt").write_bytes(content)


def cut_short(path):
    content = (path / "state.pt").read_bytes()
    (path / "state.pt").write_bytes(content[: len(content) // 2])


def lose_the_state(path):
    (path / "state.pt").unlink()


def lose_the_manifest(path):
    (path / "manifest.json").unlink()


def empty_the_manifest(path):
    (path / "manifest.json").write_text("{}")


DAMAGES = [flip_a_bit, cut_short, lose_the_state, lose_the_manifest, empty_the_manifest]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, damage):
    checkpoint.save(tmp_path, 1, {"x": torch.zeros(100)})
    path = checkpoint.save(tmp_path, 2, {"x": torch.ones(100)})
    damage(path)
    with pytest.raises(UsageError, match=r"checkpoint .*step-2 (is damaged|cannot be read)"):
        checkpoint.read(path)
    (found, content), (said,) = checkpoint.find(tmp_path)
    assert found.name == "step-1"
    assert not checkpoint.decode(content)["x"].any()
    assert "step-2" in said


class _Code:
    def __reduce__(self):
        return print, ("code was run",)


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    path = checkpoint.save(tmp_path, 1, {"x": _Code()})
    with pytest.raises(UsageError, match="cannot be loaded"):
        checkpoint.decode(checkpoint.read(path))
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
