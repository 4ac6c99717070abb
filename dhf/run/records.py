"""RunRecord: a run as it stands on disk, finished, going on or broken off; for pictures, tables and exports. Imports no torch."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dhf.errors import UsageError
from dhf.run.directory import read_lines

__all__ = ["RunRecord", "read_run", "read_runs"]


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What a run has written.

    Attributes:
        path: Its folder.
        name: What it is called among others; the end of the path that tells it apart.
        config: Its settings; empty where their file is missing.
        rows: Its metrics, one mapping per step.
        result: How it ended; None while it goes on, or where it was killed.
        solves: The histories of chosen solves.
    """

    path: Path
    name: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    result: dict[str, Any] | None
    solves: list[dict[str, Any]]

    def column(self, key: str) -> list[float]:
        """A metric by step; nan where a step has none."""
        return [_number(row.get(key)) for row in self.rows]

    def total(self, key: str) -> list[float]:
        """A metric summed up to and with each step; steps that have none add nothing."""
        return list(itertools.accumulate(0.0 if math.isnan(x) else x for x in self.column(key)))

    @property
    def elapsed(self) -> list[float]:
        """Seconds in steps, at the end of each."""
        return self.total("seconds")

    @property
    def has_costs(self) -> bool:
        """Whether its steps tell their cost in gradients."""
        return bool(self.rows) and all("gradient_equivalents" in row for row in self.rows)

    def iterative(self, key: str) -> list[float]:
        """A metric of the quadratic model by step; nan for steps of other optimizers."""
        pairs = zip(self.rows, self.column(key), strict=True)
        return [value if row.get("optimizer", "hf") == "hf" else math.nan for row, value in pairs]

    @property
    def switches(self) -> list[int]:
        """The rows with which a new phase begins."""
        return [i for i in range(1, len(self.rows)) if self.rows[i].get("phase") != self.rows[i - 1].get("phase")]


def read_run(path: Path | str) -> RunRecord:
    """One run; what is missing or cut off at its end is left out.

    Raises:
        UsageError: If there is no such folder, it holds no run, or a run without a step.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"{path} does not exist; give the directory of a run")
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        raise UsageError(f"{path} holds no run: there is no metrics.jsonl in it; give what --run-dir was")
    rows = [row for row in read_lines(metrics) if isinstance(row, dict) and "step" in row and "loss_after" in row]
    if not rows:
        raise UsageError(f"{path} has no step yet: its metrics.jsonl is empty, or not of dhf")
    solves = [row for row in read_lines(path / "solves.jsonl") if isinstance(row, dict) and "residual_norm" in row]
    return RunRecord(path, path.resolve().name, _mapping(path / "config.yaml"), rows, _result(path), solves)


def read_runs(paths: Sequence[Path | str]) -> list[RunRecord]:
    """Several runs, whose names tell them apart.

    Raises:
        UsageError: As :func:`read_run`.
    """
    runs = [read_run(path) for path in paths]
    names = _distinct([run.path.resolve().parts for run in runs])
    return [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]


def _distinct(paths: list[tuple[str, ...]]) -> list[str]:
    """The shortest ends of paths that differ, all of one length; whole paths where one is given twice."""
    longest = max(len(parts) for parts in paths)
    for length in range(1, longest + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return ["/".join(parts) for parts in paths]


def _mapping(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _result(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((path / "result.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
