"""Pictures of runs: loss against time, steps and cost, what CG and the damping did, residuals of solves, where time went.

Each function returns matplotlib's Figure, drawn under the theme in which it is called; several runs are laid over one another,
one colour and dash each. What a run has not recorded is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dhf.phases import PHASES
from dhf.run.records import RunRecord
from dhf.run.theme import LIGHT, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_overview", "draw_profile", "draw_residuals", "draw_run"]

_MARKERS = {
    "RESIDUAL_TOLERANCE": "o",
    "RELATIVE_PROGRESS": "D",
    "ITERATION_LIMIT": "s",
    "NEGATIVE_CURVATURE": "v",
    "TRUST_REGION_BOUNDARY": "^",
    "ACCURACY_LOST": "X",
    "LEAST_SQUARES_SOLUTION": "P",
}
_OTHER = "*"
_FEW = 100  # steps up to which each has a mark
_RATIOS = (-1.0, 2.0)  # reduction ratios that are shown; what is beyond stands at the edge
_APART = 5.0  # from which factor on between the lengths of runs an axis is logarithmic


def draw_run(run: RunRecord, path: Path) -> Path:
    """The overview of one run on light ground, as a file; returns its path."""
    with LIGHT.applied():
        draw_overview([run], LIGHT).savefig(path)
    return path


def draw_overview(runs: Sequence[RunRecord], theme: Theme) -> Figure:
    """Loss against seconds, steps and gradient equivalents; below, of Hessian-free steps, CG, damping and reduction ratio."""
    from matplotlib.figure import Figure

    costs = all(run.has_costs for run in runs)
    solved = [run for run in runs if any(row.get("cg_reason") for row in run.rows)]
    columns = 3 if costs or solved else 2
    figure = Figure(figsize=(4.3 * columns, 6.9 if solved else 3.7), layout="constrained")
    axes = figure.subplots(2 if solved else 1, columns, squeeze=False)
    across: list[tuple[str, Callable[[RunRecord], list[float]]]] = [
        ("time in steps (seconds)", lambda run: [0.0, *run.elapsed]),
        ("step", lambda run: [run.rows[0]["step"] - 1, *run.column("step")]),
    ]
    if costs:
        across.append(("cost (gradient equivalents)", lambda run: [0.0, *run.total("gradient_equivalents")]))
    for axis, (label, x) in zip(axes[0], across, strict=False):
        _draw_losses(axis, runs, theme, label, x)
    for axis in axes[0, len(across) :]:
        axis.set_axis_off()
    if solved:
        _draw_iterations(axes[1, 0], runs, theme)
        _draw_damping(axes[1, 1], runs, theme)
        _draw_ratio(axes[1, 2], runs, theme)
    if len(runs) > 1:
        handles = axes[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper left", ncols=min(len(runs), 6), handlelength=3.2)
    else:
        figure.suptitle(_title(runs[0]), x=0.01, ha="left", fontsize=11, color=theme.text)
    return figure


def draw_residuals(runs: Sequence[RunRecord], theme: Theme, steps: Sequence[int] | None = None) -> Figure | None:
    """Relative residuals of recorded solves by iteration, runs side by side; None where none is recorded.

    Args:
        runs: The runs.
        theme: Colours.
        steps: Of these steps alone.
    """
    import matplotlib
    from matplotlib.figure import Figure

    kept = [(run, [s for s in run.solves if steps is None or s["step"] in steps]) for run in runs]
    kept = [(run, solves) for run, solves in kept if solves]
    if not kept:
        return None
    figure = Figure(figsize=(6.4 * len(kept), 4.2), layout="constrained")
    colours, shown = matplotlib.colormaps[theme.sequence], list[float]()
    for axis, (run, solves) in zip(figure.subplots(1, len(kept), sharey=True, squeeze=False)[0], kept, strict=True):
        for i, solve in enumerate(solves):
            share = i / max(len(solves) - 1, 1)
            colour = colours(theme.sequence_from + share * (theme.sequence_to - theme.sequence_from))
            scale = solve.get("right_hand_side_norm") or 1.0
            residuals = [math.nan if r is None else r / scale for r in solve["residual_norm"]]
            shown += residuals
            label = f"step {solve['step']}: {_words(solve['reason'])}"
            axis.plot(solve["iteration"], residuals, color=colour, label=label, dashes=theme.dash(i), gid="residual")
            true = solve.get("true_residual_norm")
            if true is not None:
                axis.plot([solve["iterations"]], [true / scale], "o", color=colour, fillstyle="none", gid="true")
        if any(solve.get("true_residual_norm") is not None for _, found in kept for solve in found):
            axis.plot([], [], "o", color=theme.text, fillstyle="none", label="true residual at the end")
        _whole(axis.xaxis)
        axis.set_xlabel("iteration")
        axis.set_title(run.name, loc="left")
        axis.grid(True)
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        axis.label_outer()
    _logarithmic(figure.axes[0], shown)
    figure.axes[0].set_ylabel("residual norm / norm of the right-hand side")
    return figure


def draw_profile(runs: Sequence[RunRecord], theme: Theme) -> Figure | None:
    """Seconds of a step by phase, the mean over steps and ranks; None for runs without --profile."""
    from matplotlib.figure import Figure

    profiled = [run for run in runs if any("phase_seconds" in row for row in run.rows)]
    if not profiled:
        return None
    figure = Figure(figsize=(8.2, 1.9 + 0.55 * len(profiled)), layout="constrained")
    axis = figure.subplots()
    left = [0.0] * len(profiled)
    for i, (phase, words) in enumerate(PHASES.items()):
        widths = [_mean_of_phase(run, phase) for run in profiled]
        if any(widths):
            places = range(len(profiled))
            axis.barh(
                places, widths, left=left, height=0.62, label=words, color=theme.colour(i), edgecolor=theme.ground
            )
            left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set_yticks(range(len(profiled)), [run.name for run in profiled])
    axis.invert_yaxis()
    axis.set_xlabel("time of a step (seconds, mean over steps and ranks)")
    axis.grid(True, axis="x")
    axis.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3)
    return figure


def _draw_losses(
    axis: Axes, runs: Sequence[RunRecord], theme: Theme, label: str, x: Callable[[RunRecord], list[float]]
) -> None:
    ends = [x(run)[-1] for run in runs]
    wide = min(ends) > 0 and max(ends) > _APART * min(ends)
    shown: list[float] = []
    for i, run in enumerate(runs):
        first = run.rows[0].get("loss")
        y = [math.nan if first is None else first, *run.column("loss_after")]
        _line(axis, x(run), y, theme, i, label=run.name if len(runs) > 1 else "training")
        shown += y
        held_out = run.column("validation_loss")
        if len(runs) == 1 and not all(map(math.isnan, held_out)):
            _line(axis, x(run)[1:], held_out, theme, 1, label="held out")
            shown += held_out
            axis.legend(loc="best", handlelength=3.0)
        if len(runs) == 1:
            _mark_phases(axis, run, x(run), theme)
    axis.set_xlabel(label)
    axis.set_ylabel("loss")
    if wide:
        axis.set_xscale("log", nonpositive="mask")
    elif label == "step":
        _whole(axis.xaxis)
    _logarithmic(axis, shown)
    axis.grid(True, which="major")


def _draw_iterations(axis: Axes, runs: Sequence[RunRecord], theme: Theme) -> None:
    """Iterations of each solve; the mark tells why it ended."""
    found: dict[str, list[Any]] = {}
    for i, run in enumerate(runs):
        iterations = run.iterative("cg_iterations")
        _line(axis, run.column("step"), iterations, theme, i, marker=None, alpha=0.45 if len(runs) == 1 else 0.8)
        for row, count in zip(run.rows, iterations, strict=True):
            if row.get("cg_reason") and not math.isnan(count):
                found.setdefault(row["cg_reason"], []).append((i, row["step"], count))
    handles = []
    for j, (reason, points) in enumerate(found.items()):
        marker = _MARKERS.get(reason, _OTHER)
        for i in sorted({i for i, *_ in points}):
            colour = theme.colour(i if len(runs) > 1 else j)
            at = [(step, count) for run, step, count in points if run == i]
            axis.plot(*zip(*at, strict=True), marker, color=colour, markersize=4.5, gid=f"reason {reason}")
        colour = theme.text if len(runs) > 1 else theme.colour(j)
        handles.append(axis.plot([], [], marker, color=colour, markersize=5, label=_words(reason))[0])
    axis.set_xlabel("step")
    axis.set_ylabel("CG iterations")
    axis.set_ylim(bottom=0)
    _whole(axis.xaxis)
    _whole(axis.yaxis)
    axis.grid(True)
    axis.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, handletextpad=0.1)


def _draw_damping(axis: Axes, runs: Sequence[RunRecord], theme: Theme) -> None:
    """What keeps steps short: the damping, or the radius of a run that has none."""
    shown: list[float] = []
    kinds: dict[str, None] = {}
    for i, run in enumerate(runs):
        damped = any(v > 0 for v in run.iterative("damping"))
        bounded = not damped and any(v > 0 for v in run.iterative("radius"))
        y = [v if v > 0 else math.nan for v in run.iterative("radius" if bounded else "damping")]
        if not all(map(math.isnan, y)):
            kinds["trust-region radius" if bounded else "damping λ"] = None
        _line(axis, run.column("step"), y, theme, i, drawstyle="steps-mid" if len(run.rows) <= _FEW else "default")
        shown += y
    axis.set_xlabel("step")
    axis.set_ylabel(", ".join(kinds) or "damping λ")
    _whole(axis.xaxis)
    _logarithmic(axis, shown)
    axis.grid(True)


def _draw_ratio(axis: Axes, runs: Sequence[RunRecord], theme: Theme) -> None:
    axis.axhline(1.0, color=theme.quiet, linewidth=0.9)
    low, high = _RATIOS
    seen: list[float] = []
    for i, run in enumerate(runs):
        steps, y = run.column("step"), run.iterative("reduction_ratio")
        shape = "osD^"[i % 4]
        _line(
            axis,
            steps,
            y,
            theme,
            i,
            linestyle="none",
            marker=shape,
            markersize=3.2,
            fillstyle="full" if i < 4 else "none",
        )
        for mark, edge, beyond in (("v", low, lambda v: v < low), ("^", high, lambda v: v > high)):
            at = [step for step, value in zip(steps, y, strict=True) if beyond(value)]
            if at:  # an empty line that is not clipped would confuse matplotlib's layout
                axis.plot(at, [edge] * len(at), mark, color=theme.colour(i), markersize=5, clip_on=False, gid="beyond")
        seen += [v for v in y if not math.isnan(v)]
    axis.set_xlabel("step")
    axis.set_ylabel("reduction ratio (actual / predicted)")
    axis.set_ylim(low if min(seen, default=0.0) < 0 else 0.0, high if max(seen, default=0.0) > 1.25 else 1.25)
    _whole(axis.xaxis)
    axis.grid(True)


def _line(axis: Axes, x: Sequence[float], y: Sequence[float], theme: Theme, i: int, **options: Any) -> None:
    style = {"marker": "." if len(y) <= _FEW else None, "markersize": 4, "color": theme.colour(i), **options}
    if "linestyle" not in style:
        style["dashes"] = theme.dash(i)
    axis.plot(x, y, gid="data", **style)


def _mark_phases(axis: Axes, run: RunRecord, x: Sequence[float], theme: Theme) -> None:
    """A line where an optimizer takes over, and its name."""
    for i in [0, *run.switches] if run.switches else []:
        if i:
            axis.axvline(x[i], color=theme.quiet, linewidth=0.8)
        above = axis.get_xaxis_transform()
        axis.text(x[i], 1.01, f" {run.rows[i].get('optimizer', '')}", transform=above, color=theme.quiet, fontsize=8)


def _mean_of_phase(run: RunRecord, phase: str) -> float:
    found = [row["phase_seconds"][phase] for row in run.rows if phase in row.get("phase_seconds", {})]
    return sum(sum(ranks) / len(ranks) for ranks in found) / len(found) if found else 0.0


def _logarithmic(axis: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis, if all values are positive; one of less than a decade has plain numbers."""
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    known = [v for v in values if math.isfinite(v)]
    if not known or min(known) <= 0 or max(known) == min(known):
        return
    axis.set_yscale("log")
    if max(known) < 10 * min(known):
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(ScalarFormatter())
    else:
        axis.yaxis.set_minor_formatter(NullFormatter())


def _whole(axis: Any) -> None:
    """Ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _title(run: RunRecord) -> str:
    ranks = (run.result or {}).get("world_size")
    where = "" if ranks is None else f" on {ranks} rank{'s' if ranks > 1 else ''}"
    return f"{run.config.get('problem', run.name)}{where}" + ("" if run.result else " (not ended)")


def _words(reason: str) -> str:
    return reason.lower().replace("_", " ")
