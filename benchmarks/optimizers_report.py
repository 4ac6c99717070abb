"""The page and the pictures of optimizers.py, from its JSON file alone."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

__all__ = ["seconds_to", "value_at", "write_report"]

_COLOURS = {
    "dhf": "#c1121f",
    "dhf-cgls": "#f4845f",
    "dhf-cg": "#f4845f",
    "adam": "#4ea8de",
    "adam-minibatch": "#023e7d",
    "lbfgs": "#2b9348",
    "scipy-l-bfgs": "#80b918",
    "torchmin-l-bfgs": "#55761c",
    "scipy-trust-ncg": "#6a4c93",
    "scipy-newton-cg": "#b185db",
    "torchmin-trust-ncg": "#7f5539",
    "torchmin-newton-cg": "#c9a227",
    "scipy-lm": "#495057",
    "sklearn-newton": "#ff006e",
}
_HEAD = """# dhf against other optimizers

Time to a target, and values after equal time, on dhf's built-in problems; written from `{file}` by
`python benchmarks/optimizers.py --report`.

One process per run, one after another, on one core and one thread; seconds are the process's CPU seconds, without imports, one
uncounted first iteration, the drawing of fresh samples, and the taking of what is measured. All contenders minimise the same
objective from the same starting points. Numbers are medians over seeds; a run that has not reached its target within its limit
counts as infinitely long, and the value after a time is the last one taken by then. "dhf" has its default settings on every
problem, and is compared with the best of all that are not dhf.

- **adam**, **adam-minibatch**: torch's fused Adam at a constant learning rate, on all data and on mini-batches; the best of the
  rates 0.0003, 0.001, 0.003, 0.01 and 0.03 (and of batches of 100 and 500) for that problem. Every setting is tried on the
  first seed for a quarter of the limit, the best two for all of it.
- **lbfgs**: torch's L-BFGS with strong-Wolfe line search and a history of 50, emptied where it stalls.
- **scipy-...**: methods of `scipy.optimize` with autograd's gradients, and its Hessian products on a graph kept for each point.
  **scipy-l-bfgs** is L-BFGS-B with a history of 50, **scipy-lm** MINPACK's Levenberg-Marquardt with the whole Jacobian, for
  at least as many residuals as parameters. Their own tolerances are off.
- **sklearn-newton**: scikit-learn's `newton-cholesky`, which forms the Hessian of logistic regression, and fits nothing else.
- **torchmin-...**: pytorch-minimize, its own tolerances off.
"""


def seconds_to(run: dict[str, Any], name: str, target: float | None) -> float | None:
    """CPU seconds at which a run's value was first seen at the target or below, or None."""
    if target is None:
        return None
    points = run["points"]
    return next((s for s, value in zip(points["seconds"], points[name], strict=True) if value <= target), None)


def value_at(run: dict[str, Any], name: str, seconds: float) -> float | None:
    """The last value taken by then; None if the run was cut before."""
    if run["ended"] == "time limit" and run["limit"] < seconds:
        return None
    points = run["points"]
    return [value for s, value in zip(points["seconds"], points[name], strict=True) if s <= seconds][-1]


def write_report(numbers: Path) -> list[Path]:
    """Write the page and one picture per problem beside the JSON file; returns their paths."""
    problems = json.loads(numbers.read_text())["problems"]
    page = numbers.with_name("optimizers.md")
    pictures = [_draw(name, problem, page.with_name(f"optimizers-{name}.png")) for name, problem in problems.items()]
    summary = ["| problem | asked | dhf | best other | |", "|---|---|---|---|---|"]
    sections = []
    for (name, problem), picture in zip(problems.items(), pictures, strict=True):
        rows = {key: _row(problem, entry) for key, entry in problem["contenders"].items()}
        summary += _comparison(name, problem, rows)
        sections += _section(name, problem, rows, picture)
    page.write_text("\n".join([_HEAD.format(file=numbers.name), *summary, "", *sections]) + "\n")
    return [page, *pictures]


def _questions(problem: dict[str, Any]) -> list[tuple[str, str, float | None]]:
    """What is compared: (words, value's name, time), the time None for that to the target."""
    first, *others = problem["measure"]
    asked: list[tuple[str, str, float | None]] = []
    if problem["target"] is not None:
        asked.append((f"seconds to {_words(first)} {problem['target']:g}", first, None))
    asked += [(f"{_words(name)} after {t:g} s", name, t) for t in problem["times"] for name in (first, *others)]
    return asked


def _row(problem: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """Medians over a contender's seeds for each question (inf for never, None for unknown), or its error."""
    runs = [run for run in entry["runs"] if "error" not in run]
    if not runs:
        return {"error": entry["runs"][0]["error"]}
    row: dict[str, Any] = {"runs": len(runs)}
    for words, name, time in _questions(problem):
        if time is None:
            found = [seconds_to(run, name, problem["target"]) for run in runs]
            row[words] = _median([math.inf if s is None else s for s in found])
            row["reached"] = sum(s is not None for s in found)
        else:
            values = [value_at(run, name, time) for run in runs]
            row[words] = None if None in values else _median(values)
    return row


def _comparison(name: str, problem: dict[str, Any], rows: dict[str, Any]) -> list[str]:
    """One line of the summary per question."""
    lines = []
    for words, _, time in _questions(problem):
        limit = {key: entry["limit"] for key, entry in problem["contenders"].items()}
        known = {k: row[words] for k, row in rows.items() if row.get(words) is not None}
        others = {k: value for k, value in known.items() if not k.startswith("dhf")}
        if "dhf" not in known or not others:
            continue
        best = min(others, key=lambda k: (others[k], -limit[k]))
        ours, theirs = known["dhf"], others[best]
        if time is None:
            first = _told(ours, limit["dhf"])
            other = f"none in {limit[best]:g} s" if math.isinf(theirs) else f"{theirs:.3g} ({best})"
        else:
            first, other = f"{ours:.3g}", f"{theirs:.3g} ({best})"
        lines.append(f"| {name} | {words} | {first} | {other} | {_verdict(ours, theirs, limit[best], time)} |")
    return lines


def _verdict(ours: float, theirs: float, limit: float, time: float | None) -> str:
    if time is not None:
        if ours == theirs:
            return "equal"
        return f"{_ratio(theirs / ours)} times lower" if ours < theirs else f"**{_ratio(ours / theirs)} times higher**"
    if math.isinf(ours):
        return "none reaches it" if math.isinf(theirs) else "**dhf does not reach it**"
    if math.isinf(theirs):
        return f"only dhf reaches it; more than {_ratio(limit / ours)} times as fast"
    if ours > theirs:
        return f"**dhf takes {_ratio(ours / theirs)} times as long**"
    return f"dhf is {_ratio(theirs / ours)} times as fast"


def _section(name: str, problem: dict[str, Any], rows: dict[str, Any], picture: Path) -> list[str]:
    """A problem's heading, table and picture."""
    options = "".join(f", {key} {value}" for key, value in problem["options"].items())
    decay = f", weight decay {problem['weight_decay']:g}" if problem["weight_decay"] else ""
    batch = f"; dhf takes fresh mini-batches of {problem['batch']:,}" if problem["batch"] else ""
    asked = _questions(problem)
    target = problem["target"] is not None
    heads = [
        "contender",
        *(words for words, _, _ in asked),
        *(["seeds that reached it"] if target else ["seeds"]),
        "ended",
    ]
    lines = [f"## {name}", "", f"`{problem['problem']}`{options}{decay}, {problem['dtype']}{batch}.", ""]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for key, row in rows.items():
        entry = problem["contenders"][key]
        if "error" in row:
            lines.append(f"| {key} |{' |' * len(asked)} | not run: {row['error']} |")
            continue
        cells = [_told(row[w], entry["limit"]) if t is None else _number(row[w]) for w, _, t in asked]
        seeds = f"{row['reached']} of {row['runs']}" if target else str(row["runs"])
        lines.append(f"| {key}{_setting(entry)} | {' | '.join(cells)} | {seeds} | {_endings(entry)} |")
    processors = {
        f"{e['environment']['processor']}, torch {e['environment']['torch']}" for e in problem["contenders"].values()
    }
    dates = sorted(e["environment"]["time"][:10] for e in problem["contenders"].values())
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return [*lines, "", f"{'; '.join(sorted(processors))}; {when}.", "", f"![{name}]({picture.name})", ""]


def _draw(name: str, problem: dict[str, Any], path: Path) -> Path:
    """The first value against CPU seconds: a thin line per seed, a disc at the median time to the target."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    measure, target = problem["measure"][0], problem["target"]
    seen: list[float] = []
    for key, entry in problem["contenders"].items():
        runs = [run for run in entry["runs"] if "error" not in run]
        style = {"color": _COLOURS[key], "linewidth": 1.8 if key == "dhf" else 1.0, "zorder": 3 if key == "dhf" else 2}
        for i, run in enumerate(runs):
            axis.plot(run["points"]["seconds"][1:], run["points"][measure][1:], label=None if i else key, **style)
            seen += run["points"][measure]
        if runs and target is not None:
            reached = [seconds_to(run, measure, target) for run in runs]
            median = _median([math.inf if s is None else s for s in reached])
            if math.isfinite(median):
                axis.plot(median, target, "o", color=_COLOURS[key], markeredgecolor="black", markersize=8, zorder=4)
    if target is not None:
        axis.axhline(target, color="black", linestyle="--", linewidth=0.8)
    for t in problem["times"]:
        axis.axvline(t, color="black", linestyle=":", linewidth=0.8)
    axis.set_xscale("log")
    if seen and min(seen) > 0 and max(seen) > 3 * min(seen):
        axis.set_yscale("log")
        if max(seen) < 30 * min(seen):  # few decades: plain numbers
            for formatted in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                formatted(LogFormatter(minor_thresholds=(2, 0.7)))
    axis.set_xlabel("CPU seconds, one core")
    axis.set_ylabel(_words(measure))
    axis.set_title(name)
    axis.grid(True, which="both", alpha=0.2)
    if seen:
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=120)
    return path


def _median(values: list[Any]) -> float:
    """The middle one; of an even number the upper, so that a run that never arrives is not averaged."""
    return statistics.median_high(values)


def _told(seconds: float, limit: float) -> str:
    return f"{seconds:.3g}" if math.isfinite(seconds) else f"never ({limit:g} s)"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _ratio(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}" if ratio >= 1.1 else f"{ratio:.2f}"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _setting(entry: dict[str, Any]) -> str:
    """What a search has chosen."""
    if not entry["searched"]:
        return ""
    return " (" + ", ".join(f"{_words(key)} {value}" for key, value in entry["settings"].items()) + ")"


def _endings(entry: dict[str, Any]) -> str:
    return "; ".join(sorted({run.get("error") or run["ended"].rstrip(".") for run in entry["runs"]}))
