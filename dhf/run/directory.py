"""RunDirectory: the files of a run. Only rank 0 writes; every rank reads."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

from dhf.errors import UsageError

__all__ = ["RunDirectory", "default_directory", "plain", "read_lines", "write_atomically"]

_MARKS = ("config.yaml", "metrics.jsonl", "result.json", "checkpoints")
_REST = ("solves.jsonl", "plots", "tensorboard")


class RunDirectory:
    """``config.yaml``, ``metrics.jsonl``, ``solves.jsonl``, ``result.json``, ``checkpoints/`` and ``plots/`` under one folder.

    Args:
        path: The folder; made by :meth:`claim`.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.plots = self.path / "plots"
        self.events = self.path / "tensorboard"
        self.metrics = self.path / "metrics.jsonl"
        self._lines = _Lines(self.metrics)
        self._solves = _Lines(self.path / "solves.jsonl")

    def holds_run(self) -> bool:
        """Whether a run has been written here."""
        return any((self.path / name).exists() for name in _MARKS)

    def check_free(self) -> None:
        """Raise UsageError if a run is here already."""
        if self.holds_run():
            raise UsageError(
                f"{self.path} already holds a run; use --resume auto to go on with it, --overwrite to replace it, "
                "or another --run-dir"
            )

    def claim(self, config_yaml: str, *, resumed_step: int | None) -> None:
        """Make the folder and write the configuration; a resumed run keeps its metrics up to ``resumed_step``."""
        if resumed_step is None:
            self._clear()
        self.plots.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        write_atomically(self.path / "config.yaml", config_yaml)
        (self.path / "result.json").unlink(missing_ok=True)
        self._lines.keep(resumed_step or 0)
        self._solves.keep(resumed_step or 0)

    def append(self, row: dict[str, Any]) -> None:
        """Add one line to the metrics, and those before it that could not be written.

        Raises:
            OSError: If the disk is full, say; the line is kept for the next call, and the file ends with a whole line.
        """
        self._lines.append(row)

    def append_solve(self, row: dict[str, Any]) -> None:
        """Add the history of one solve, as :meth:`append`."""
        self._solves.append(row)

    def write_result(self, result: dict[str, Any]) -> None:
        """Write how the run ended."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / "result.json", json.dumps(plain(result), indent=2) + "\n")

    def _clear(self) -> None:
        """Remove what a run wrote here, and nothing else."""
        for name in (*_MARKS, *_REST):
            target = self.path / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)


class _Lines:
    """A file of one JSON object per line, each of a step."""

    def __init__(self, path: Path) -> None:
        self._path, self._unwritten = path, ""

    def append(self, row: dict[str, Any]) -> None:
        """Add one line, and those before it that could not be written."""
        self._unwritten += _line(row)
        with self._path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                left = self._unwritten.encode()
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(end)
                raise
        self._unwritten = ""

    def keep(self, step: int) -> None:
        """Leave the lines up to a step alone."""
        write_atomically(self._path, "".join(_line(row) for row in read_lines(self._path) if row["step"] <= step))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, up to one that was cut when the run died; none if there is no file."""
    rows = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return rows


def default_directory(problem: str) -> str:
    """``runs/PROBLEM-TIME``; a user's file gives its stem."""
    stem = Path(problem.rpartition(":")[0]).stem if ".py:" in problem else problem
    return str(Path("runs") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file in one step, so that no reader sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _line(row: dict[str, Any]) -> str:
    return json.dumps(plain(row)) + "\n"


def plain(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
