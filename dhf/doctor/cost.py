"""What a run would cost, measured, and the settings that follow: micro-batch size, products, retention, dtype, preset."""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from typing import Any

import torch

from dhf.byte_size import bytes_in_words
from dhf.coordinator import Coordinator
from dhf.curvature import GradientGraph
from dhf.curvature.rebuild import retained_bytes
from dhf.curvature.retention import Retention
from dhf.doctor.finding import NOTE, Section
from dhf.doctor.trial import MATRICES
from dhf.objective import LeastSquares
from dhf.operator import GlobalOperator
from dhf.optim import HessianFree
from dhf.parameters import Parameters
from dhf.problems import Shard
from dhf.run.assembly import Parts, graph_builder
from dhf.run.micro_batches import choose_size

__all__ = ["Advice", "measure_cost"]

_SECONDS = 0.5  # of products, about, for each way to take them
_FEWEST, _MOST = 3, 50
_QUICK = 1.0  # seconds of a product on the whole of a step's samples, up to which it is measured
_WORTH = 0.9  # of the retained products' time, from which on recordings are recommended


@dataclasses.dataclass(frozen=True, slots=True)
class Advice:
    """The recommended flags, by name."""

    flags: dict[str, str]

    def __str__(self) -> str:
        return " ".join(f"--{name} {value}" for name, value in self.flags.items())


def measure_cost(parts: Parts, coordinator: Coordinator, seed: int) -> tuple[Section, Advice]:
    """Memory and time on samples of the run's first step. Collective.

    Raises:
        UsageError, RankError: If not even the smallest micro-batch can be differentiated.
    """
    section = Section("cost")
    optimizer, objective = parts.optimizer, parts.problem.objective
    assert isinstance(optimizer, HessianFree)
    size = parts.phase.config.micro_batch_size
    if not isinstance(size, int):
        size, note = choose_size(parts, coordinator, 0)
        section.fact("micro-batch", note)
    advice = {"micro-batch-size": str(size), "preset": optimizer.preset}
    advice["retain"] = _memory(section, parts, coordinator, size)
    advice["products"] = _products(section, parts, coordinator, size, seed)
    parameters = Parameters(objective.module)
    advice["dtype"] = str(parameters.dtype).removeprefix("torch.")
    if isinstance(objective, LeastSquares) and parameters.dtype == torch.float32:
        advice["dtype"] = "float64"
        section.find(
            NOTE,
            "least squares in float32: residuals below about 1e-6 of the first ones are lost in rounding",
            "--dtype",
            "--dtype float64, where many digits are wanted",
        )
    for text in optimizer.notes:
        section.fact("settings", text)
    return section, Advice(advice)


def _memory(section: Section, parts: Parts, coordinator: Coordinator, size: int) -> str:
    """What graphs take, and whether all of them can be kept."""
    objective, train, build = parts.problem.objective, parts.train, graph_builder(parts.optimizer)
    parameters = Parameters(objective.module)
    batch = coordinator.attempt(lambda: train.first(0, size))
    on_gpu = parameters.device.type == "cuda"
    here = coordinator.ranks_here()

    def look() -> tuple[int, float]:
        room = Retention("auto", sharers=1 if on_gpu else here).settle(parameters.device)
        return (0 if batch is None else retained_bytes(objective, parameters, batch, build)), room

    everyone = coordinator.comm.gather_objects(coordinator.attempt(look))
    each, room = max(nbytes for nbytes, _ in everyone), min(left for _, left in everyone)
    number = -(-max(train.sizes()) // size)
    if build is GradientGraph:
        section.fact("memory", f"{bytes_in_words(each)} for the gradient of a micro-batch of {size}; no graph is kept")
        return "auto"
    # beside a kept graph, a product takes as much as one again
    kept = number if (number + 1) * each <= room else max(0, int(room / max(each, 1)) - 2)
    section.fact(
        "memory",
        f"{bytes_in_words(each)} for the graph of a micro-batch of {size}; {number} of them a rank, of which {kept} fit into "
        f"{bytes_in_words(room)}",
    )
    return "all" if kept == number else "auto"


def _products(section: Section, parts: Parts, coordinator: Coordinator, size: int, seed: int) -> str:
    """Times of products, retained and traced, on the whole of a step's samples where that is quick; the way to take them."""
    optimizer, objective, train = parts.optimizer, parts.problem.objective, parts.train
    assert isinstance(optimizer, HessianFree)
    make = functools.partial(
        MATRICES[optimizer.settings.curvature], objective, coordinator=coordinator, seed=seed, retain="auto"
    )
    first = coordinator.attempt(lambda: train.first(0, size))
    batches = [] if first is None else [first]
    with make(batches, products="retained") as A:
        one, samples = _time(A, few=True), sum(A.rows)
    if one * train.batch_size <= _QUICK * samples:
        whole = Shard(parts.problem.train, A.comm.rank, A.comm.size, **_like(parts), micro_batch_size=size)
        batches = coordinator.attempt(lambda: whole.batches(0))
    seconds: dict[str, float] = {}
    for way in ("retained", "traced"):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with make(batches, products=way) as A:
                taken, samples = _time(A), sum(A.rows)
        refusals = coordinator.comm.gather_objects([str(w.message) for w in told if "retained, not" in str(w.message)])
        refusal = next((words[0] for words in refusals if words), "")
        if refusal:
            section.fact(f"products, {way}", f"none: the objective {refusal.partition('since the objective ')[2]}")
            continue
        seconds[way] = taken
        on_all = f", about {_rate(samples / (taken * train.batch_size))} on all {train.batch_size:,}"
        section.fact(
            f"products, {way}",
            f"{_rate(1 / taken)} a second on {samples:,} samples{on_all if samples < train.batch_size else ''}",
        )
    return "traced" if seconds.get("traced", float("inf")) <= _WORTH * seconds["retained"] else "retained"


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _like(parts: Parts) -> dict[str, Any]:
    """What a shard of a step is made with."""
    config, parameters = parts.phase.config, Parameters(parts.problem.objective.module)
    return {
        "device": parameters.device,
        "dtype": parameters.dtype,
        "batch_size": config.batch_size,
        "seed": config.seed,
    }


def _time(A: GlobalOperator, *, few: bool = False) -> float:
    """Seconds of a product, the least of some, on the slowest rank."""
    v = torch.ones_like(A.gradient)

    def once() -> float:
        began = time.perf_counter()
        A @ v
        if A.device.type == "cuda":
            torch.cuda.synchronize(A.device)
        return time.perf_counter() - began

    once()
    first = max(A.comm.gather_objects(once()))
    number = _FEWEST if few else max(_FEWEST, min(_MOST, int(_SECONDS / max(first, 1e-6))))
    times = [once() for _ in range(number)]
    return max(A.comm.gather_objects(min(times)))
