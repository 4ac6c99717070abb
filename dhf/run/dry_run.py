"""dry_run: what a run would need, from one micro-batch, without taking a step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dhf.curvature.shard import BuildGraph, ShardCurvature
from dhf.objective import Objective
from dhf.optim import FirstOrder, HessianFree
from dhf.parameters import Parameters
from dhf.problems import Shard
from dhf.run.assembly import graph_builder

__all__ = ["Needs", "in_lines", "measure", "retained_bytes"]


@dataclasses.dataclass(frozen=True)
class Needs:
    """What one rank needs for a step.

    Attributes:
        parameters: Length n of the flat vector.
        samples: Samples in this rank's shard of the first step.
        micro_batches: Pieces it is differentiated in.
        graph_bytes: Kept by the graphs of all its micro-batches, from the tensors that the first one saves.
        vector_bytes: Flat vectors of a step: parameters and snapshot, gradient, product, CG's five, warm start, kept iterates;
            for a first-order method parameters and snapshots, gradients, and what it keeps.
        iterations: Most in a solve; 0 for a first-order method.
    """

    parameters: int
    samples: float
    micro_batches: int
    graph_bytes: int
    vector_bytes: int
    iterations: int


def measure(objective: Objective, batches: Sequence[Any], optimizer: HessianFree | FirstOrder) -> Needs:
    """What this rank needs for a step on these micro-batches."""
    parameters, build = Parameters(objective.module), graph_builder(optimizer)
    counts = [objective.count(batch) for batch in batches]
    graph = retained_bytes(objective, parameters, batches[0], build) if batches else 0
    whole = round(graph * sum(counts) / counts[0]) if batches and counts[0] else 0
    vectors = parameters.numel * parameters.tensors[0].element_size() * _vectors(optimizer)
    iterations = optimizer.settings.cg_max_iterations if isinstance(optimizer, HessianFree) else 0
    return Needs(parameters.numel, sum(counts), len(batches), whole, vectors, iterations)


def _vectors(optimizer: HessianFree | FirstOrder) -> int:
    if isinstance(optimizer, FirstOrder):
        return 5 + optimizer.kept_vectors
    return 11 + math.ceil(math.log(max(optimizer.settings.cg_max_iterations, 2), 1.3))


def in_lines(everyone: Sequence[Needs], train: Shard, dtype: str) -> list[str]:
    """What all ranks need for a step, in lines of prose."""
    here, largest = everyone[0], max(everyone, key=lambda needs: needs.graph_bytes)
    products = f"at most {here.iterations + 2} (iterations, start and true residual), one collective each"
    return [
        f"parameters          {here.parameters:,} ({dtype})",
        f"samples per step    {train.batch_size:,} of {train.samples:,}",
        f"shards per rank     {', '.join(f'{needs.samples:g}' for needs in everyone)}",
        f"micro-batches       {', '.join(str(needs.micro_batches) for needs in everyone)}",
        f"products per step   {products if here.iterations else 'none'}",
        f"retained graphs     {largest.graph_bytes / 2**20:,.1f} MiB on the fullest rank",
        f"vectors             {here.vector_bytes / 2**20:,.1f} MiB on every rank",
    ]


def retained_bytes(objective: Objective, parameters: Parameters, batch: Any, build: BuildGraph) -> int:
    """Bytes of distinct storage that the graphs of one micro-batch keep alive, parameters and data left out."""
    own = {p.untyped_storage().data_ptr() for p in objective.module.parameters()}
    seen: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        shard = ShardCurvature(objective, parameters, [batch], [0], build)
    shard.close()
    return sum(seen.values())
