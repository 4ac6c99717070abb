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
from dhf.parameters import Parameters

__all__ = ["Needs", "measure", "retained_bytes"]


@dataclasses.dataclass(frozen=True)
class Needs:
    """What one rank needs for a step.

    Attributes:
        parameters: Length n of the flat vector.
        samples: Samples in this rank's shard of the first step.
        micro_batches: Pieces it is differentiated in.
        graph_bytes: Kept by the graphs of all its micro-batches, from the tensors that the first one saves.
        vector_bytes: Flat vectors of a step: parameters and snapshot, gradient, product, CG's five, warm start, kept iterates.
    """

    parameters: int
    samples: float
    micro_batches: int
    graph_bytes: int
    vector_bytes: int


def measure(objective: Objective, batches: Sequence[Any], build: BuildGraph, max_iterations: int) -> Needs:
    """What this rank needs for a step on these micro-batches."""
    parameters = Parameters(objective.module)
    counts = [objective.count(batch) for batch in batches]
    graph = retained_bytes(objective, parameters, batches[0], build) if batches else 0
    whole = round(graph * sum(counts) / counts[0]) if batches and counts[0] else 0
    iterates = math.ceil(math.log(max(max_iterations, 2), 1.3))
    width = parameters.tensors[0].element_size()
    return Needs(parameters.numel, sum(counts), len(batches), whole, (11 + iterates) * parameters.numel * width)


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
