"""choose_size: the micro-batch size that ``auto`` stands for, by what ranks measure of it together.

Sizes are doubled from small ones up, while a micro-batch's graph and a product on it fit into the memory that graphs may take
on every rank, and the time of a sample still falls. A measured choice would be another one in each run, so it is written into the
run's configuration and checkpoints.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import torch

from dhf.coordinator import Coordinator
from dhf.curvature import GradientGraph, Retention
from dhf.curvature.rebuild import retained_bytes
from dhf.curvature.shard import BuildGraph, ShardCurvature
from dhf.memory import ran_out_of_memory
from dhf.objective import Objective
from dhf.optim import HessianFree
from dhf.parameters import Parameters
from dhf.problems import Shard
from dhf.run.assembly import Parts, graph_builder
from dhf.run.config import Config

__all__ = ["choose_size", "settled", "written_size"]

_SMALLEST = 32
_GAIN = 0.05  # by which twice the size must be faster per sample
_REPEATS = 3
_TWICE = 2  # a graph, and as much for a product on it


def choose_size(parts: Parts, coordinator: Coordinator, step: int) -> tuple[int, str]:
    """The size, the same on every rank, and a note that says why. Collective.

    Args:
        parts: What the run works with in this phase.
        coordinator: How ranks agree.
        step: Whose samples are measured.

    Raises:
        UsageError, RankError: If not even the smallest can be differentiated.
    """
    train, objective, build = parts.train, parts.problem.objective, graph_builder(parts.optimizer)
    budget, largest = _budget(parts, coordinator.ranks_here()), max(train.sizes())
    size, rate = min(_SMALLEST, largest), 0.0
    chosen, best, first = size, float("inf"), 0.0
    why = "the fastest"
    while True:
        measured = coordinator.attempt(functools.partial(_measure, objective, train, step, size, build))
        rate = rate or measured.rate
        too_large = measured.ran_out or _TWICE * rate * size > budget
        seconds, samples, misfits = coordinator.reduce([measured.seconds, measured.samples, too_large])
        if misfits and size > _SMALLEST:
            why = "the largest that fits"
            break
        each = seconds / samples if samples else 0.0
        first = first or each
        if best < float("inf") and each > (1 - _GAIN) * best:
            break
        chosen, best = size, each
        if size >= largest:
            break
        size = min(2 * size, largest)
    smallest = min(_SMALLEST, largest)
    than = "" if chosen == smallest else f", against {1e6 * first:.3g} at {smallest}"
    return chosen, f"micro-batch size {chosen}, {why}: {1e6 * best:.3g} µs a sample for its graph and a product{than}"


def settled(config: Config, sizes: dict[int, int]) -> Config:
    """The configuration with these micro-batch sizes, by phase number."""
    if not config.phases:
        return dataclasses.replace(config, micro_batch_size=sizes.get(1, config.micro_batch_size))
    phases = [
        {**phase, "micro_batch_size": sizes[number]} if number in sizes else phase
        for number, phase in enumerate(config.phases, 1)
    ]
    return dataclasses.replace(config, phases=phases)


def written_size(written: dict[str, Any] | None, phase: int) -> int | None:
    """The micro-batch size of a phase in the settings that a checkpoint was written with; None where there is none."""
    written = written or {}
    phases = written.get("phases") or []
    own = phases[phase - 1] if phase <= len(phases) else {}
    size = own.get("micro_batch_size", written.get("micro_batch_size"))
    return size if isinstance(size, int) else None


@dataclasses.dataclass(frozen=True, slots=True)
class _Measured:
    """What a rank has found: seconds for so many samples, bytes of graph per sample, and whether memory ran out."""

    seconds: float = 0.0
    samples: int = 0
    rate: float = 0.0
    ran_out: bool = False


def _budget(parts: Parts, ranks_here: int) -> float:
    """Bytes that a graph and a product on it may take on this rank."""
    optimizer, parameters = parts.optimizer, Parameters(parts.problem.objective.module)
    retain = optimizer.settings.retain if isinstance(optimizer, HessianFree) else "auto"
    sharers = 1 if parameters.device.type == "cuda" else ranks_here
    return Retention("auto" if retain in ("all", "none") else retain, sharers=sharers).settle(parameters.device)


def _measure(objective: Objective, train: Shard, step: int, size: int, build: BuildGraph) -> _Measured:
    """The least time of some for the graph of so many of this rank's samples and one product on it."""
    batch = train.first(step, size)
    if batch is None or not objective.count(batch):
        return _Measured()
    parameters = Parameters(objective.module)
    v = torch.ones(parameters.numel, dtype=parameters.dtype, device=parameters.device)
    out, times, rows = torch.empty_like(v), [], 0
    try:
        nbytes = retained_bytes(objective, parameters, batch, build)
        for _ in range(_REPEATS):
            _wait(parameters.device)
            began = time.perf_counter()
            shard = ShardCurvature(objective, parameters, [batch], [0], build)
            shard.begin(shard.count, 0)
            if build is not GradientGraph:
                shard.product(v, out)
            _wait(parameters.device)
            times.append(time.perf_counter() - began)
            rows = shard.rows
            shard.close()
    except Exception as error:
        if not ran_out_of_memory(error) or size <= _SMALLEST:
            raise
        return _Measured(ran_out=True)
    return _Measured(min(times), rows, nbytes / max(rows, 1))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
