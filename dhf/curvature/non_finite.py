"""find_non_finite: the sample from which NaN or infinity comes, by halving the micro-batch that shows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dhf.curvature.shard import BuildGraph
from dhf.errors import UsageError
from dhf.evaluation import reproducible, twice_differentiable
from dhf.objective import Objective, rows, select
from dhf.parameters import Parameters

__all__ = ["NonFinite", "find_non_finite", "places_in_words"]


@dataclasses.dataclass(frozen=True, slots=True)
class NonFinite:
    """Where NaN or infinity was found.

    Attributes:
        micro_batch: Index within the rank's shard.
        row: Index of the sample within the micro-batch; None where only several samples together show it.
        what: ``"outputs"``, ``"loss"``, ``"gradient"`` or ``"product"``: the first that is not finite.
    """

    micro_batch: int
    row: int | None
    what: str

    def __str__(self) -> str:
        where = "" if self.row is None else f"sample {self.row} of "
        return f"the {self.what} of {where}micro-batch {self.micro_batch}"


def places_in_words(places: Mapping[int, NonFinite | None]) -> str:
    """Ranks, each with where it was found there, if it was looked for."""
    return ", ".join(f"rank {rank} ({place})" if place else f"rank {rank}" for rank, place in places.items())


def find_non_finite(
    objective: Objective,
    parameters: Parameters,
    batches: Sequence[Any],
    seeds: Sequence[int],
    build: BuildGraph,
    v: Tensor | None = None,
) -> NonFinite | None:
    """The first sample of a shard whose outputs, loss, gradient or product is not finite.

    Graphs are built anew, of ever smaller parts of a micro-batch: about ``2 log2`` of its samples.

    Args:
        objective: What is differentiated.
        parameters: With respect to what.
        batches: This rank's micro-batches.
        seeds: One random seed per micro-batch.
        build: Makes the graph of one micro-batch.
        v: The vector of the product that was not finite, shape (n,); None to look at loss and gradient alone.

    Returns:
        Where it is, or None if every micro-batch is finite when looked at by itself.
    """
    for j, (batch, seed) in enumerate(zip(batches, seeds, strict=True)):
        if not objective.count(batch):
            continue

        def trouble(part: Any, seed: int = seed) -> str | None:
            with (
                reproducible(objective, parameters.device, seed),
                twice_differentiable(objective.module, parameters.device),
            ):
                return _trouble(objective, parameters, part, build, v)

        what = trouble(batch)
        if what is not None:
            return _halve(batch, j, what, trouble)
    return None


def _trouble(
    objective: Objective, parameters: Parameters, part: Any, build: BuildGraph, v: Tensor | None
) -> str | None:
    with torch.no_grad():
        outputs = objective.outputs(part)
        if not torch.isfinite(outputs).all():
            return "outputs"
        if not torch.isfinite(objective.loss(outputs, part)):
            return "loss"
    graph = build(objective, parameters, part)
    if not all(torch.isfinite(g).all() for g in graph.gradient):
        return "gradient"
    if v is not None:
        graph.begin(0)
        if not all(torch.isfinite(p).all() for p in graph.product(parameters.split(v))):
            return "product"
    return None


def _halve(batch: Any, j: int, what: str, trouble: Any) -> NonFinite:
    try:
        first, last = 0, rows(batch)
    except UsageError:  # a batch of a form that cannot be cut
        return NonFinite(j, None, what)
    while last - first > 1:
        middle = (first + last) // 2
        for low, high in ((first, middle), (middle, last)):
            found = trouble(select(batch, slice(low, high)))
            if found is not None:
                first, last, what = low, high, found
                break
        else:
            return NonFinite(j, None, what)
    return NonFinite(j, first, what)
