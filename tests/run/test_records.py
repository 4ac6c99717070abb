"""Runs as they stand on disk: whole, going on, broken off, and not there."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest

from dhf.errors import UsageError
from dhf.run.config import Config
from dhf.run.directory import RunDirectory
from dhf.run.recorder import Recorder
from dhf.run.records import read_run, read_runs


def write(path: Path, rows: list[dict[str, Any]], tail: str = "") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


ROWS = [
    {"step": 1, "loss": 4.0, "loss_after": 2.0, "seconds": 0.5, "phase": 1},
    {"step": 2, "loss": 2.0, "loss_after": None, "seconds": 0.25, "phase": 1},
    {"step": 3, "loss": 2.0, "loss_after": 1.0, "seconds": 1.0, "phase": 2},
]


def test_what_is_cut_off_or_missing_is_left_out(tmp_path: Path) -> None:
    run = read_run(write(tmp_path / "run", ROWS, '{"step": 4, "loss": 1.0, "lo'))
    assert (run.rows, run.config, run.result, run.solves) == (ROWS, {}, None, [])
    assert run.elapsed == [0.5, 0.75, 1.75]
    losses = run.column("loss_after")
    assert (losses[0], losses[2]) == (2.0, 1.0)
    assert math.isnan(losses[1])
    assert run.switches == [2]
    assert not run.has_costs
    for name in ("config.yaml", "result.json"):
        (run.path / name).write_bytes(b"\xff{")
    broken = read_run(run.path)
    assert (broken.rows, broken.config, broken.result) == (ROWS, {}, None)


def test_folders_without_a_run_are_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere does not exist; give the directory of a run"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"holds no run: there is no metrics.jsonl in it"):
        read_run(tmp_path)
    with pytest.raises(UsageError, match="has no step yet"):
        read_run(write(tmp_path / "new", []))
    with pytest.raises(UsageError, match=r"has no step yet: its metrics.jsonl is empty, or not of dhf"):
        read_run(write(tmp_path / "other", [{"epoch": 1}]))


def test_names_are_the_ends_of_paths_that_differ(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, ROWS) for name in ("a/hf", "b/hf", "b/adam")]
    assert [run.name for run in read_runs(paths[1:])] == ["hf", "adam"]
    assert [run.name for run in read_runs(paths)] == ["a/hf", "b/hf", "b/adam"]
    assert [run.name for run in read_runs([paths[0], paths[0]])] == ["hf", "hf"]


def test_a_full_disk_ends_the_events_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """Stands for TensorBoard's events, on a disk that is full when they are closed."""

        def __init__(self, *_: Any) -> None:
            self.closed = 0

        def close(self) -> None:
            self.closed += 1
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dhf.run.recorder.Events", Full)
    said: list[str] = []
    recorder = Recorder(RunDirectory(tmp_path), Config(tensorboard=True), 0, said.append)
    recorder.close()
    recorder.close()
    assert len(said) == 1
    assert "no more events for TensorBoard" in said[0]
    assert "No space left on device" in said[0]
