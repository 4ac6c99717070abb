"""dry_run: what a run would need, from one micro-batch, without taking a step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from dhf.byte_size import bytes_in_words
from dhf.curvature import GradientGraph, Retention
from dhf.curvature.rebuild import retained_bytes
from dhf.curvature.retention import size_of
from dhf.memory import resident_memory
from dhf.objective import Objective
from dhf.optim import FirstOrder, HessianFree
from dhf.parameters import Parameters
from dhf.problems import Shard
from dhf.run.assembly import graph_builder

__all__ = ["Needs", "in_lines", "measure"]


@dataclasses.dataclass(frozen=True)
class Needs:
    """What one rank needs for a step.

    Attributes:
        parameters: Length n of the flat vector.
        samples: Samples in this rank's shard of the first step.
        micro_batches: Pieces it is differentiated in.
        retained: Those of them whose graphs are kept.
        graph_bytes: What the graphs of all its micro-batches take, from the tensors that the first one saves.
        peak_bytes: What the kept ones take, with a rebuilt one and with what a product takes.
        resident_bytes: What the process holds before its first step.
        vector_bytes: Flat vectors of a step: parameters and snapshot, gradient, product, CG's five, warm start, kept iterates;
            for a first-order method parameters and snapshots, gradients, and what it keeps.
        iterations: Most in a solve; 0 for a first-order method.
    """

    parameters: int
    samples: float
    micro_batches: int
    retained: int
    graph_bytes: int
    peak_bytes: int
    resident_bytes: int
    vector_bytes: int
    iterations: int


def measure(
    objective: Objective, batches: Sequence[Any], optimizer: HessianFree | FirstOrder, ranks_here: int = 1
) -> Needs:
    """What this rank needs for a step on these micro-batches, with so many ranks on its host."""
    parameters, build = Parameters(objective.module), graph_builder(optimizer)
    counts = [objective.count(batch) for batch in batches]
    sizes = [size_of(batch) for batch, count in zip(batches, counts, strict=True) if count]
    on_gpu = parameters.device.type == "cuda"
    # a gradient alone keeps no graph
    retain = optimizer.settings.retain if isinstance(optimizer, HessianFree) and build is not GradientGraph else "all"
    retention = Retention(retain, sharers=1 if on_gpu else ranks_here)
    retention.look(parameters, sizes)
    if sizes:
        first = next(batch for batch, count in zip(batches, counts, strict=True) if count)
        retention.measured(sizes[0], retained_bytes(objective, parameters, first, build))
    retained, peak = retention.peak(sizes)
    if build is GradientGraph:
        retained, peak = 0, (retention.rate or 0.0) * max(sizes, default=0)
    resident = torch.cuda.memory_allocated(parameters.device) if on_gpu else resident_memory()
    vectors = parameters.numel * parameters.tensors[0].element_size() * _vectors(optimizer)
    iterations = optimizer.settings.cg_max_iterations if isinstance(optimizer, HessianFree) else 0
    return Needs(
        parameters.numel,
        sum(counts),
        len(sizes),
        retained,
        round((retention.rate or 0.0) * sum(sizes)),
        round(peak),
        resident,
        vectors,
        iterations,
    )


def _vectors(optimizer: HessianFree | FirstOrder) -> int:
    if isinstance(optimizer, FirstOrder):
        return 5 + optimizer.kept_vectors
    return 11 + math.ceil(math.log(max(optimizer.settings.cg_max_iterations, 2), 1.3))


def in_lines(everyone: Sequence[Needs], train: Shard, dtype: str) -> list[str]:
    """What all ranks need for a step, in lines of prose."""
    here = everyone[0]
    kept = ", ".join(f"{needs.retained} of {needs.micro_batches}" for needs in everyone)
    graphs = max(needs.graph_bytes for needs in everyone)
    peak = max(needs.resident_bytes + needs.peak_bytes + needs.vector_bytes for needs in everyone)
    products = f"at most {here.iterations + 2} (iterations, start and true residual), one collective each"
    return [
        f"parameters          {here.parameters:,} ({dtype})",
        f"samples per step    {train.batch_size:,} of {train.samples:,}",
        f"shards per rank     {', '.join(f'{needs.samples:g}' for needs in everyone)}",
        f"micro-batches       {', '.join(str(needs.micro_batches) for needs in everyone)}",
        f"products per step   {products if here.iterations else 'none'}",
        f"graphs              {bytes_in_words(graphs)} on the fullest rank, if all are kept",
        f"graphs kept         {kept}; the others are rebuilt for each product",
        f"vectors             {bytes_in_words(here.vector_bytes)} on every rank",
        f"predicted peak      {bytes_in_words(peak)} on the fullest rank, with what it holds now",
    ]
