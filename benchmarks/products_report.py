"""The page and the picture of products.py, from its JSON file alone."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

__all__ = ["write_report"]

_MATRICES = ("Hessian", "Gauss-Newton")
_OWN = {how: f"dhf {how}" for how in ("retained", "traced", "compiled")}
_RETAINED, _COMPILED = _OWN["retained"], _OWN["compiled"]
# what is neither dhf nor a package of its own for PyTorch
_LAUNCHED = "dhf retained, launched"
_NO_PEERS = (*_OWN.values(), _LAUNCHED, "rebuilt", "JAX")
_COLOURS = {
    "rebuilt": "#adb5bd",
    _LAUNCHED: "#6c757d",
    _RETAINED: "#c1121f",
    _OWN["traced"]: "#e85d04",
    _COMPILED: "#f9a66c",
    "curvlinops": "#023e7d",
    "BackPACK": "#4ea8de",
    "PyHessian": "#2b9348",
    "pytorch-minimize": "#80b918",
    "torch.func": "#6a4c93",
    "torch.func, vjp kept": "#b185db",
    "JAX": "#c9a227",
}
# where a bar of the picture ends, in g
_LONGEST = 6.0
_HEAD = """# What a curvature product costs

Written from `{file}` by `python benchmarks/products.py --report{flag}`.

Times are in g, one gradient (forward and backward, eager) of the same network and batch in the same turn; medians over rounds,
with quartiles in brackets. All contenders of a network are timed in turn in one process {where}, each on
one batch, with vectors in its own form and the whole of its per-call work. "ahead by" is the time of the fastest other package
for PyTorch (torch.func included, JAX not) over dhf's, round by round: **below 1 dhf is slower**. A build is what each new point
costs once, freeing what is kept included. {extra}
The error is the largest of two vectors, in the maximum norm, against double backward in float64.

- **rebuilt**: double backward as one writes it first, the graph built and thrown away each time.
- **dhf retained**, **traced**, **compiled**: `dhf.Hessian` and `dhf.GaussNewton`, as solvers call them, by what is given as
  `products`. Recording and compiling are done once per process, and not counted in a build.
- **curvlinops**: its linear operators on flat vectors, the check of determinism off. It takes Hessians by jvp of jacrev, which on
  the transformer is wrong by a percent in torch 2.13, also in float64, where jvp of grad is right.
- **BackPACK**: `backpack.hessianfree`, given the graph of the gradient, or of loss and outputs; it builds the rest each time.
- **PyHessian**: the product of its own algorithms on one batch, on a kept graph.
- **pytorch-minimize**: what its Newton and least-squares methods multiply with, on kept graphs.
- **torch.func**: jvp of grad, as its manual recommends; Gauss-Newton by jvp and a vjp that is kept. **vjp kept**: a vjp of grad,
  made once. `torch.func.linearize` of a gradient is left out: from its second call on it is wrong on the autoencoder and nn.RNN
  (in torch 2.13, float64, by 0.8 and 1e-7), and a build takes seconds.
- **JAX**: `jax.linearize`, all jitted, of the same networks written in JAX; that it compiles is not counted.

The PINN takes derivatives within its forward pass. torch.func, and curvlinops, which rests on it, cannot enter
`torch.autograd.grad`, and are given the same residual by grad of grad; JAX by jvp of jvp, its shortest way. For torch.func the
mean of squares is written out, since jvp of grad fails within torch's. PyHessian and BackPACK cannot take a parameter that the
loss does not depend on (the network's last bias); it is frozen for them.
"""


_WHERE = ("on one core, in its CPU seconds", "on one GPU, by the clock, each until the device has finished")
_EXTRA = (
    "MB are those of torch's own allocations: held between products, and at the peak of the first one.",
    "dhf records a product when it is taken for the second time at a point, and replays it from then on; **second** is what that "
    "one costs, and **launched** is dhf without.",
)


def write_report(numbers: Path) -> list[Path]:
    """Write the page and the picture beside the JSON file; returns their paths."""
    subjects = json.loads(numbers.read_text())["subjects"]
    page = numbers.with_name(f"{numbers.stem.removesuffix('-cpu')}.md")
    on_gpu = numbers.stem.endswith("-cuda")
    flag = " --device cuda" if on_gpu else ""
    lines = [_HEAD.format(file=numbers.name, flag=flag, where=_WHERE[on_gpu], extra=_EXTRA[on_gpu])]
    for dtype in ("float32", "float64"):
        measured = {name: by_dtype[dtype] for name, by_dtype in subjects.items() if dtype in by_dtype}
        if measured:
            lines += [f"## {dtype}", "", *_summary(measured), ""]
            if dtype == "float32":
                lines += [f"![Gauss-Newton and Hessian products]({page.stem}.png)", ""]
            lines += _break_even(measured)
    for name, by_dtype in subjects.items():
        for dtype, entry in by_dtype.items():
            lines += _section(f"{name}, {dtype}", entry)
    page.write_text("\n".join(lines).rstrip() + "\n")
    return [page, _draw(subjects, page.with_suffix(".png"))]


def _cost(entry: dict[str, Any], contender: str, matrix: str) -> float | None:
    """The median product in g, or None."""
    seconds = entry["contenders"].get(contender, {}).get(matrix, {}).get("seconds")
    return statistics.median(_ratios(seconds, entry["gradient_seconds"])) if seconds else None


def _ratios(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def _summary(measured: dict[str, dict[str, Any]]) -> list[str]:
    """The main table, and one of who is ahead."""
    heads = [f"{m} {how}" for m in _MATRICES for how in ("rebuilt", *_OWN)]
    lines = [f"| product, g | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name, entry in measured.items():
        costs = [_cost(entry, who, m) for m in _MATRICES for who in ("rebuilt", *_OWN.values())]
        lines.append(f"| {name} | {' | '.join(map(_number, costs))} |")
    heads = ["", "matrix", "fastest other for PyTorch, g", *(f"{how} ahead by" for how in _OWN), "JAX, g"]
    lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, entry in measured.items():
        for matrix in _MATRICES:
            peer, least = _fastest_peer(entry, matrix)
            other = f"{_number(least)} ({peer})" if peer else "none"
            ahead = [_ahead(entry, peer, ours, matrix) for ours in _OWN.values()]
            lines.append(
                f"| {name} | {matrix} | {other} | {' | '.join(ahead)} | {_number(_cost(entry, 'JAX', matrix))} |"
            )
    return lines


def _fastest_peer(entry: dict[str, Any], matrix: str) -> tuple[str | None, float | None]:
    costs = {who: _cost(entry, who, matrix) for who in entry["contenders"] if who not in _NO_PEERS}
    known = {who: cost for who, cost in costs.items() if cost is not None}
    if not known:
        return None, None
    best = min(known, key=known.__getitem__)
    return best, known[best]


def _ahead(entry: dict[str, Any], peer: str | None, ours: str, matrix: str) -> str:
    """The median over rounds of the peer's time over ours, pair by pair."""
    if peer is None or _cost(entry, ours, matrix) is None:
        return "–"
    theirs, own = (entry["contenders"][who][matrix]["seconds"] for who in (peer, ours))
    factor = statistics.median(_ratios(theirs, own))
    return f"**{factor:.2f}**" if factor < 1 else f"{factor:.2f}"


def _break_even(measured: dict[str, dict[str, Any]]) -> list[str]:
    """After how many products compiling has repaid itself."""
    lines = []
    for name, entry in measured.items():
        for matrix, seconds in entry.get("compile_seconds", {}).items():
            own = entry["contenders"]
            if seconds is None or "seconds" not in own.get(_RETAINED, {}).get(matrix, {}):
                continue
            pairs = zip(own[_RETAINED][matrix]["seconds"], own[_COMPILED][matrix]["seconds"], strict=True)
            saved = statistics.median(kept - fast for kept, fast in pairs)
            cells = [f"{seconds[state]:.1f}" for state in ("cold", "warm")]
            cells += [f"{seconds[state] / saved:,.0f}" if saved > 0 else "never" for state in ("cold", "warm")]
            lines.append(f"| {name} | {matrix} | {1e3 * saved:.2f} | {' | '.join(cells)} |")
    if not lines:
        return []
    heads = [
        "",
        "matrix",
        "ms saved per product",
        "seconds to compile, cold",
        "warm cache",
        "products to break even, cold",
        "warm",
    ]
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *lines, ""]


def _section(title: str, entry: dict[str, Any]) -> list[str]:
    """One network's heading, table, and who could not take part."""
    milliseconds = 1e3 * statistics.median(entry["gradient_seconds"])
    on_gpu = entry["environment"]["device"] == "cuda"
    columns = ("product, g", "build, g", "second, g" if on_gpu else "MB held; peak", "error")
    heads = ["", *(f"{m} {what}" for m in _MATRICES for what in columns)]
    lines = [f"## {title}", "", f"{entry['parameters']:,} parameters; g is {milliseconds:.2f} ms.", ""]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    refusals: dict[str, list[str]] = {}
    for who, by_matrix in entry["contenders"].items():
        cells: list[str] = []
        for matrix in _MATRICES:
            found = by_matrix[matrix]
            if "seconds" in found:
                cells += _cells(found, entry)
                continue
            cells += ["–"] * 4
            refusals.setdefault(f"{who}: {_refusal(found)}", []).append(matrix)
        if any(cell != "–" for cell in cells):
            lines.append(f"| {who} | {' | '.join(cells)} |")
    lines += [""]
    for reason, matrices in refusals.items():
        which = "" if len(matrices) == len(_MATRICES) else f" ({matrices[0]})"
        lines.append(f"- {reason}{which}")
    where, versions = entry["environment"], entry.get("versions", {})
    installed = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    machine = where["gpu"] or where["processor"]
    return [*lines, *([""] if refusals else []), f"{machine}; {installed}; {where['time'][:10]}.", ""]


def _cells(found: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    ratios = _ratios(found["seconds"], entry["gradient_seconds"])
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    build = statistics.median(_ratios(found["build_seconds"], entry["gradient_seconds_among_builds"]))
    third = (
        f"{found['held'] / 1e6:.1f}; {found['peak'] / 1e6:.1f}"
        if "held" in found
        else f"{found['second_seconds'] / statistics.median(entry['gradient_seconds']):.2f}"
    )
    return [f"{middle:.2f} ({low:.2f}–{high:.2f})", f"{build:.2f}", third, f"{found['error']:.0e}"]


def _refusal(found: dict[str, Any]) -> str:
    if "wrong" in found:
        return f"not timed, since its products are wrong, by a relative {found['error']:.1e}"
    return f"cannot: {found['failed']}" if "failed" in found else found["unavailable"]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _draw(subjects: dict[str, Any], path: Path) -> Path:
    """Bars of every contender on every network, float32 where that was measured; on white, to be read on any page."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    measured = {name: by_dtype.get("float32") or next(iter(by_dtype.values())) for name, by_dtype in subjects.items()}
    figure = Figure(figsize=(13, 1.0 + 1.35 * len(measured)), layout="constrained", facecolor="white")
    axes = figure.subplots(1, 2, sharey=True, squeeze=False)[0]
    drawn = [who for who in _COLOURS if any(_cost(e, who, m) for e in measured.values() for m in _MATRICES)]
    thickness = 0.88 / max(1, len(drawn))
    for axis, matrix in zip(axes, _MATRICES, strict=True):
        for i, who in enumerate(drawn):
            for row, entry in enumerate(measured.values()):
                cost = _cost(entry, who, matrix)
                if cost is None:
                    continue
                place, length = row + (i - (len(drawn) - 1) / 2) * thickness, min(cost, _LONGEST)
                axis.barh(place, length, thickness, color=_COLOURS[who])
                axis.text(length, place, f" {cost:.2f}", va="center", fontsize=6.5)
        axis.set_xlim(0, 1.12 * _LONGEST)
        axis.set_title(f"{matrix} product")
        axis.set_xlabel(f"time, in gradients of the same run (bars end at {_LONGEST:g})")
        axis.grid(True, axis="x", alpha=0.25)
        axis.set_axisbelow(True)
    axes[0].set_yticks(range(len(measured)), list(measured))
    axes[0].invert_yaxis()
    handles = [Patch(color=_COLOURS[who], label=who) for who in drawn]
    axes[1].legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=120)
    return path
