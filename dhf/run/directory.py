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

__all__ = ["RunDirectory", "default_directory", "plain", "write_atomically"]

_MARKS = ("config.yaml", "metrics.jsonl", "result.json", "checkpoints")


class RunDirectory:
    """``config.yaml``, ``metrics.jsonl``, ``result.json``, ``checkpoints/`` and ``plots/`` under one folder.

    Args:
        path: The folder; made by :meth:`claim`.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.plots = self.path / "plots"
        self.metrics = self.path / "metrics.jsonl"
        self._unwritten = ""

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
        kept = [] if resumed_step is None else [row for row in self._rows() if row["step"] <= resumed_step]
        write_atomically(self.metrics, "".join(_line(row) for row in kept))

    def append(self, row: dict[str, Any]) -> None:
        """Add one line to the metrics, and those before it that could not be written.

        Raises:
            OSError: If the disk is full, say; the line is kept for the next call, and the file ends with a whole line.
        """
        self._unwritten += _line(row)
        with self.metrics.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                left = self._unwritten.encode()
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(end)
                raise
        self._unwritten = ""

    def write_result(self, result: dict[str, Any]) -> None:
        """Write how the run ended."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / "result.json", json.dumps(plain(result), indent=2) + "\n")

    def _rows(self) -> list[dict[str, Any]]:
        if not self.metrics.exists():
            return []
        rows = []
        for text in self.metrics.read_text().splitlines():
            try:
                rows.append(json.loads(text))
            except json.JSONDecodeError:  # a line that was cut when the run died
                break
        return rows

    def _clear(self) -> None:
        """Remove what a run wrote here, and nothing else."""
        for name in (*_MARKS, "plots"):
            target = self.path / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)


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


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN or infinity: they become null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
