"""ShardCurvature: one graph per micro-batch of a shard, built once, weighted by sample counts, freed at the end.

A new curvature writes a Graph for one micro-batch; looping, weighting and retention are done here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dhf.errors import UsageError
from dhf.evaluation import full_precision, naming_micro_batch, reproducible, twice_differentiable
from dhf.objective import Objective, rows
from dhf.parameters import Parameters

__all__ = ["AddSums", "BuildGraph", "Graph", "MicroBatch", "ShardCurvature"]


class Graph(Protocol):
    """What one micro-batch keeps for a whole solve.

    Attributes:
        loss: Mean loss over the micro-batch, 0-dim.
        gradient: Its gradient, one tensor per parameter.
        rows: Samples in the micro-batch.
        width: Numbers in the outputs per sample.
    """

    loss: Tensor
    gradient: Sequence[Tensor]
    rows: int
    width: int

    def begin(self, first_row: int) -> None:
        """Called once before the first product, with the micro-batch's place among all data."""

    def product(self, v: Sequence[Tensor]) -> Sequence[Tensor]:
        """The curvature of the mean loss times v, one tensor per parameter."""


BuildGraph = Callable[[Objective, Parameters, Any], Graph]
# (graph, v, its share of all samples) -> one tensor per parameter
Multiply = Callable[[Any, Sequence[Tensor], float], Sequence[Tensor]]
# adds what one micro-batch contributes to the sums over all samples
AddSums = Callable[["MicroBatch", Sequence[Tensor]], None]


@dataclasses.dataclass(frozen=True, slots=True)
class MicroBatch:
    """A micro-batch as it stands among all data.

    Attributes:
        batch: What ``objective.outputs`` takes.
        rows: Samples in it.
        weight: Its share of all samples; its means, times this, add up over micro-batches and ranks to the mean over all.
        first_row: The place of its first sample.
    """

    batch: Any
    rows: int
    weight: float
    first_row: int


def own_product(graph: Graph, v: Sequence[Tensor], weight: float) -> Sequence[Tensor]:
    """The graph's own product."""
    return graph.product(v)


class ShardCurvature:
    """The products of one rank's shard, on graphs that are kept from construction to :meth:`close`.

    Args:
        objective: What is differentiated.
        parameters: With respect to what.
        batches: This rank's micro-batches; none for an empty shard. Those that count zero are passed over.
        seeds: One random seed per micro-batch.
        build: Makes the graph of one micro-batch.
        move_buffers: Whether BatchNorm's running statistics follow this forward pass.

    Attributes:
        loss_sum: ``Σ count·loss``, float64.
        gradient_sum: ``Σ count·gradient``, shape (n,).
        count: ``Σ count``.
        rows: Samples in the shard.
        width: Numbers in the outputs per sample; 0 for an empty shard.
    """

    def __init__(
        self,
        objective: Objective,
        parameters: Parameters,
        batches: Sequence[Any],
        seeds: Sequence[int],
        build: BuildGraph,
        *,
        move_buffers: bool = False,
    ) -> None:
        self._objective, self._parameters = objective, parameters
        self._snapshot = parameters.snapshot()
        self._kept: list[_Kept] = []
        self.rows = 0
        self.gradient_sum = torch.zeros(parameters.numel, dtype=parameters.dtype, device=parameters.device)
        losses = torch.zeros((), dtype=torch.float64, device=parameters.device)
        for j, (batch, seed) in enumerate(zip(batches, seeds, strict=True)):
            with naming_micro_batch(j):
                count = objective.count(batch)
                if count == 0:
                    with contextlib.suppress(UsageError):
                        self.rows += rows(batch)
                    continue
                with (
                    reproducible(objective, parameters.device, seed, move_buffers=move_buffers),
                    twice_differentiable(objective.module, parameters.device),
                ):
                    graph = build(objective, parameters, batch)
            losses += graph.loss.double() * count
            for view, piece in zip(parameters.split(self.gradient_sum), graph.gradient, strict=True):
                view.add_(piece, alpha=count)
            graph.gradient = ()
            self._kept.append(_Kept(j, graph, count, self.rows, batch, seed))
            self.rows += graph.rows
        self.loss_sum = losses.item()
        self.count = sum(kept.count for kept in self._kept)
        self.width = self._kept[0].graph.width if self._kept else 0
        self._total, self._first_row = 0.0, 0

    def begin(self, total: float, first_row: int) -> None:
        """Take the place among all data: the global sample count, and the index of this shard's first row."""
        self._total, self._first_row = total, first_row
        for kept in self._kept:
            with naming_micro_batch(kept.index):
                kept.graph.begin(first_row + kept.first_row)

    def product(
        self,
        v: Tensor,
        out: Tensor,
        multiply: Multiply = own_product,
        *,
        ready: Callable[[int], None] | None = None,
    ) -> None:
        """This shard's share of the global product, ``Σ count/total · A_j v``, into ``out`` of shape (n,).

        Args:
            v: Shape (n,).
            out: Shape (n,); overwritten.
            multiply: Another product of the graphs than their own.
            ready: Called with the index of each parameter as soon as its part of ``out`` is final, while the last micro-batch's
                product goes on. The numbers are the same without.

        Raises:
            StaleGraphError: If a parameter has moved since the graphs were built.
        """
        self._snapshot.check()
        pieces_of_v = self._parameters.split(v)
        if not self._kept:
            out.zero_()
        with full_precision(self._parameters.device):
            for i, kept in enumerate(self._kept):
                weight = kept.count / self._total
                with naming_micro_batch(kept.index):
                    if ready is not None and i == len(self._kept) - 1:
                        self._stream(kept.graph, pieces_of_v, weight, out, multiply, ready, first=i == 0)
                        continue
                    pieces = multiply(kept.graph, pieces_of_v, weight)
                if i == 0:
                    self._parameters.flatten(pieces, out=out)
                    if weight != 1.0:
                        out.mul_(weight)
                else:
                    for view, piece in zip(self._parameters.split(out), pieces, strict=True):
                        view.add_(piece, alpha=weight)

    def _stream(
        self,
        graph: Graph,
        v: Sequence[Tensor],
        weight: float,
        out: Tensor,
        multiply: Multiply,
        ready: Callable[[int], None],
        *,
        first: bool,
    ) -> None:
        """One micro-batch's product, each parameter's part of it taken as the backward pass has finished with it."""
        views, taken = self._parameters.split(out), set()

        def take(i: int, piece: Tensor) -> None:
            if first:
                torch.mul(piece, weight, out=views[i])
            else:
                views[i].add_(piece, alpha=weight)
            taken.add(i)
            ready(i)

        with contextlib.ExitStack() as stack:
            for i, p in enumerate(self._parameters.tensors):
                stack.callback(p.register_hook(functools.partial(_hand_on, take, i)).remove)
            pieces = multiply(graph, v, weight)
        for i, piece in enumerate(pieces):
            if i not in taken:
                take(i, piece)

    def add_sums(self, add: AddSums, out: Sequence[Tensor]) -> None:
        """Let every micro-batch add to ``out``, under the random numbers and kernels of its graph.

        Raises:
            StaleGraphError: If a parameter has moved since the graphs were built.
        """
        self._snapshot.check()
        for kept in self._kept:
            with (
                naming_micro_batch(kept.index),
                reproducible(self._objective, self._parameters.device, kept.seed),
                twice_differentiable(self._objective.module, self._parameters.device),
            ):
                weight, first_row = kept.count / self._total, self._first_row + kept.first_row
                add(MicroBatch(kept.batch, kept.graph.rows, weight, first_row), out)

    def moved(self) -> Tensor | None:
        """On a GPU, how many parameters moved by value, as a 0-dim tensor; on a CPU :meth:`product` has looked."""
        return self._snapshot.moved() if self._parameters.device.type != "cpu" else None

    def close(self) -> None:
        """Free the graphs."""
        self._kept.clear()


def _hand_on(take: Callable[[int, Tensor], None], i: int, piece: Tensor) -> None:
    """A hook that leaves the gradient as it is."""
    with torch.no_grad():
        take(i, piece)


@dataclasses.dataclass(frozen=True, slots=True)
class _Kept:
    """A micro-batch that counts: its index and the row it begins at within the shard, its graph, weight, data and seed."""

    index: int
    graph: Graph
    count: float
    first_row: int
    batch: Any
    seed: int
