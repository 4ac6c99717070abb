"""Runs side by side in a table of text: what they solved, what it cost to reach given losses, how they ended, how they differ."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dhf.run.config import WATCHING
from dhf.run.records import RunRecord

__all__ = ["OWN_METRICS", "differences", "levels_of", "reached", "table"]

Table = list[tuple[str, list[str]]]

# of where and how a run is watched, not of what it computes
_APART = (
    "run_dir",
    "overwrite",
    "resume",
    "dry_run",
    "checkpoint_every",
    "keep_checkpoints",
    "stop_signals",
    "timeout",
)
_WIDEST = 34

# what dhf itself reports of a step; other names are the problem's
OWN_METRICS = (
    *("step", "phase", "optimizer", "loss", "loss_after", "gradient_norm", "step_length", "damping", "reduction_ratio"),
    *("products", "evaluations", "gradient_equivalents", "seconds", "reason", "fallback", "radius", "cg_iterations"),
    *("cg_reason", "cg_residual_norm", "cg_true_residual_norm", "non_finite_ranks", "own_seconds", "waiting_seconds"),
    *("slowest_rank", "peak_memory_mb", "phase_seconds", "products_per_second", "collectives", "bytes_reduced"),
)


def table(runs: Sequence[RunRecord], levels: Sequence[float] | None = None) -> str:
    """The table, one column per run.

    Args:
        runs: At least one.
        levels: Losses to be reached; by default the best of each run.
    """
    lines: Table = [
        ("run", [run.name for run in runs]),
        ("problem", [_text(run.config.get("problem")) for run in runs]),
        ("optimizer", [_optimizers(run) for run in runs]),
        ("ranks", [_text((run.result or {}).get("world_size")) for run in runs]),
        ("steps", [f"{run.rows[-1]['step']:,}" for run in runs]),
        ("ended", [_ended(run) for run in runs]),
        ("loss at first", [_loss(run.rows[0].get("loss")) for run in runs]),
        ("loss at last", [_loss(run.rows[-1]["loss_after"]) for run in runs]),
        ("least loss", [_loss(_least(run)) for run in runs]),
        ("seconds in steps", [f"{run.elapsed[-1]:.4g}" for run in runs]),
        ("seconds a step", [f"{run.elapsed[-1] / len(run.rows):.4g}" for run in runs]),
        ("products", [f"{run.total('products')[-1]:,.0f}" for run in runs]),
        ("gradient equivalents", [_cost(run, len(run.rows) - 1) for run in runs]),
        ("solves ended by", [_reasons(run) for run in runs]),
        ("most memory (MB)", [_text(run.rows[-1].get("peak_memory_mb")) for run in runs]),
        *_own_metrics(runs),
    ]
    for level in levels_of(runs) if levels is None else levels:
        at = [reached(run, level) for run in runs]
        lines.append((f"to a loss of {level:.6g}", [""] * len(runs)))
        for name, shown in _COSTS:
            lines.append((f"  {name}", [_at(run, i, shown) for run, i in zip(runs, at, strict=True)]))
    found = differences(runs)
    if found:
        lines.append(("settings that differ", [""] * len(runs)))
        lines += [(f"  {name}", values) for name, values in found.items()]
    return _lines(lines)


def reached(run: RunRecord, level: float) -> int | None:
    """The row of the first step that ends at or below a loss, or None."""
    return next((i for i, loss in enumerate(run.column("loss_after")) if loss <= level), None)


def levels_of(runs: Sequence[RunRecord]) -> list[float]:
    """The least loss of each run, from the largest down; the last is reached by the best run alone."""
    levels: list[float] = []  # runs that differ by rounding alone reach one and the same
    for level in sorted((_least(run) for run in runs if not math.isnan(_least(run))), reverse=True):
        if not levels or _loss(level) != _loss(levels[-1]):
            levels.append(level)
    return levels


def differences(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """The settings that are not the same in all runs that tell them, with each one's value."""
    known = [run.config for run in runs]
    names = dict.fromkeys(name for config in known for name in config if name not in (*_APART, *WATCHING))
    found: dict[str, list[str]] = {}
    for name in names:
        values = [config.get(name) for config in known]
        if isinstance(values[0], Mapping) or name == "options":
            keys = dict.fromkeys(key for value in values for key in value or {})
            inner = {f"{name}.{key}": [(value or {}).get(key) for value in values] for key in keys}
        else:
            inner = {name: values}
        for key, each in inner.items():
            told = [value for config, value in zip(known, each, strict=True) if name in config]
            if any(value != told[0] for value in told):
                found[key] = [_text(value) for value in each]
    return found


def _own_metrics(runs: Sequence[RunRecord]) -> Table:
    """The last values of what the problem reports, and of the loss on held-out data."""
    names = dict.fromkeys(name for run in runs for name in run.rows[-1] if name not in OWN_METRICS)
    return [(name, [_loss(run.rows[-1].get(name)) for run in runs]) for name in names]


def _optimizers(run: RunRecord) -> str:
    names = [run.rows[i].get("optimizer", "hf") for i in [0, *run.switches]]
    return ", ".join(names)


def _ended(run: RunRecord) -> str:
    if run.result is None:
        return "not ended"
    return str(run.result.get("reason", "")).lower().replace("_", " ")


def _reasons(run: RunRecord) -> str:
    counts: dict[str, int] = {}
    for row in run.rows:
        if row.get("cg_reason"):
            counts[row["cg_reason"]] = counts.get(row["cg_reason"], 0) + 1
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{reason.lower().replace('_', ' ')} {count}" for reason, count in ordered) or "-"


def _least(run: RunRecord) -> float:
    return min((x for x in run.column("loss_after") if not math.isnan(x)), default=math.nan)


def _cost(run: RunRecord, row: int) -> str:
    return f"{run.total('gradient_equivalents')[row]:,.1f}" if run.has_costs else "-"


def _at(run: RunRecord, row: int | None, shown: Callable[[RunRecord, int], str]) -> str:
    return "-" if row is None else shown(run, row)


_COSTS: tuple[tuple[str, Callable[[RunRecord, int], str]], ...] = (
    ("seconds", lambda run, row: f"{run.elapsed[row]:.4g}"),
    ("steps", lambda run, row: f"{run.rows[row]['step']:,}"),
    ("gradient equivalents", _cost),
)


def _loss(value: Any) -> str:
    return "-" if value is None or (isinstance(value, float) and math.isnan(value)) else f"{value:.6g}"


def _text(value: Any) -> str:
    return "-" if value is None or value == [] else str(value)


def _lines(lines: Table) -> str:
    """Columns as wide as they need; a cell that is too long goes on below itself."""
    first = max(len(name) for name, _ in lines)
    cells = [(name, [_wrapped(value) for value in values]) for name, values in lines]
    widths = [max(len(part) for _, row in cells for part in row[i]) for i in range(len(lines[0][1]))]
    text = []
    for name, row in cells:
        for k in range(max(len(parts) for parts in row)):
            own = [f"{parts[k] if k < len(parts) else '':>{width}}" for parts, width in zip(row, widths, strict=True)]
            text.append("  ".join([f"{name if k == 0 else '':<{first}}", *own]).rstrip())
    return "\n".join(text)


def _wrapped(value: str) -> list[str]:
    return textwrap.wrap(value, _WIDEST) or [""]
