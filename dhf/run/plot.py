"""Pictures of a run: its loss against time and steps, its damping, and its CG iterations; lines where phases meet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["draw_run"]


def draw_run(metrics: Path, path: Path) -> Path:
    """Draw one run's metrics file as a PNG of four panels; returns the picture's path."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    rows: list[dict[str, Any]] = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [row["step"] for row in rows]
    elapsed: list[float] = []
    for row in rows:
        elapsed.append((elapsed[-1] if elapsed else 0.0) + row["seconds"])
    switches = [i for i in range(1, len(rows)) if rows[i].get("phase") != rows[i - 1].get("phase")]
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    axes = figure.subplots(2, 2)
    panels = [
        (axes[0, 0], elapsed, "loss_after", "seconds", "loss", "log"),
        (axes[0, 1], steps, "loss_after", "step", "loss", "log"),
        (axes[1, 0], steps, "damping", "step", "damping", "log"),
        (axes[1, 1], steps, "cg_iterations", "step", "CG iterations", "linear"),
    ]
    for axis, x, key, x_label, y_label, scale in panels:
        y = [row[key] if key == "loss_after" or row.get("optimizer", "hf") == "hf" else None for row in rows]
        axis.plot(x, y, marker="." if len(rows) < 100 else None, linewidth=1.2)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        for i in switches:
            axis.axvline(x[i - 1], color="0.5", linewidth=0.8)
        known = [value for value in y if value is not None]
        if scale == "log" and known and min(known) > 0:
            axis.set_yscale("log")
            if max(known) < 10 * min(known):  # less than a decade: label the minor ticks as plain numbers
                axis.yaxis.set_minor_formatter(ScalarFormatter())
                axis.yaxis.set_major_formatter(ScalarFormatter())
        else:
            axis.yaxis.set_major_locator(MaxNLocator(integer=key == "cg_iterations"))
        if x_label == "step":
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(True, which="both", alpha=0.25)
    for axis in axes[1]:
        axis.sharex(axes[0, 1])
    for i in [0, *switches] if switches else []:
        at, above = elapsed[max(i - 1, 0)], axes[0, 0].get_xaxis_transform()
        axes[0, 0].text(at, 1.01, f" {rows[i]['optimizer']}", transform=above, color="0.4", fontsize=8)
    figure.savefig(path, dpi=120)
    return path
