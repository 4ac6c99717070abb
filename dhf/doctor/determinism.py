"""Is the objective one function? It is evaluated twice under the same random numbers, and once under others.

Where two evaluations differ, the first module is named that returns something else for the same inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dhf.doctor.conditions import as_in_a_run
from dhf.doctor.finding import ERROR, NOTE, WARNING, Section, names, of_error
from dhf.doctor.modules import Call, calls_of
from dhf.evaluation import dropping
from dhf.objective import Objective
from dhf.parameters import Parameters

__all__ = ["compare_evaluations"]

_ROUNDING = 1e-5  # relative difference that sums in another order may make on a GPU


def compare_evaluations(objective: Objective, batch: Any, seed: int) -> Section:
    """Whether the loss repeats, and whether it depends on random numbers; on one rank's own."""
    section = Section("determinism")
    dropout = dropping(objective.module)
    if dropout:
        section.find(
            WARNING,
            "dropout is on: dhf holds its mask for a step, and every step minimises another function",
            names("module", dropout),
            "module.eval() before the problem is returned, or p=0",
        )
    try:
        first, calls = _evaluate(objective, batch, seed)
        second, again = _evaluate(objective, batch, seed)
        other, drawn = _evaluate(objective, batch, seed + 1)
    except Exception as error:
        section.findings.append(of_error(error, "outputs(batch) or loss(outputs, batch)"))
        return section
    _same_seed(section, objective, first, second, _place(calls, again))
    random = not _equal(first, other)
    same = _equal(first, second)
    section.fact("two evaluations", "the same to the bit" if same else f"differ by {_apart(first, second):.1e}")
    section.fact("random numbers", "taken in the forward pass" if random and same else "none taken")
    if random and same and not dropout:
        section.find(
            WARNING,
            "the loss depends on random numbers: dhf holds them for a step, and every step minimises another function",
            _place(calls, drawn),
            "draw them once and keep them as a buffer, or switch them off as in eval()",
        )
    return section


def _same_seed(section: Section, objective: Objective, first: Tensor, second: Tensor, where: str) -> None:
    if _equal(first, second):
        return
    if Parameters(objective.module).device.type == "cuda" and _apart(first, second) < _ROUNDING:
        section.find(
            NOTE,
            f"the loss differs by {_apart(first, second):.1e} between two evaluations: sums in changing order",
            where,
            "--deterministic, where runs must repeat to the bit",
        )
        return
    section.find(
        ERROR,
        f"the loss is {float(first):.8g} and {float(second):.8g} in two evaluations with the same random numbers",
        where,
        "let the forward pass depend on parameters, buffers, the batch and torch's random numbers alone: no counter, clock, "
        "Python or NumPy random numbers",
    )


def _evaluate(objective: Objective, batch: Any, seed: int) -> tuple[Tensor, list[Call]]:
    """The loss, and what each module was given and returned."""
    with as_in_a_run(objective, seed):
        calls, outputs = calls_of(objective, batch)
        return objective.loss(outputs, batch).detach(), calls


def _place(first: Sequence[Call], second: Sequence[Call]) -> str:
    """The module that returns something else for the same inputs."""
    for before, after in zip(first, second, strict=False):
        same_inputs = _equal((before.args, before.kwargs), (after.args, after.kwargs))
        if before.path == after.path and same_inputs and not _equal(before.output, after.output):
            return f"{names('module', [before.path])} ({type(before.module).__name__})"
    return "outputs(batch) or loss(outputs, batch)"


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b)


def _apart(a: Tensor, b: Tensor) -> float:
    scale = max(abs(float(a)), abs(float(b))) or 1.0
    return abs(float(a) - float(b)) / scale
