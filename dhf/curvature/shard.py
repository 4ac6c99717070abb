"""ShardCurvature: one graph per micro-batch of a shard, weighted by sample counts, kept to the end or rebuilt per product.

A new curvature writes a Graph for one micro-batch; looping, weighting and retention are done here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dhf.curvature.gradient import GradientGraph
from dhf.curvature.rebuild import Rebuild
from dhf.curvature.retention import Retention, counting, size_of
from dhf.errors import UsageError
from dhf.evaluation import full_precision, naming_micro_batch, reproducible, twice_differentiable
from dhf.memory import ran_out_of_memory
from dhf.objective import Objective, rows
from dhf.parameters import Parameters
from dhf.replay import aside

__all__ = ["AddSums", "BuildGraph", "Graph", "MicroBatch", "ShardCurvature"]


class Graph(Protocol):
    """What one micro-batch keeps for a whole solve.

    A class of graphs may also have an ``along(objective, parameters, batch, v)`` that makes one for products with v alone, with
    a ``push(v)``, where that is cheaper; see :mod:`dhf.curvature.rebuild`.

    Attributes:
        loss: Mean loss over the micro-batch, 0-dim.
        gradient: Its gradient, one tensor per parameter.
        rows: Samples in the micro-batch.
        width: Numbers in the outputs per sample.
    """

    gradient: Sequence[Tensor]
    rows: int
    width: int

    @property
    def loss(self) -> Tensor: ...

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
    """The products of one rank's shard, from construction to :meth:`close`.

    A micro-batch's graph is kept from then to the end or, where the retention says so, rebuilt for each product and freed after
    it; under the same random numbers, so that it gives the same.

    Args:
        objective: What is differentiated.
        parameters: With respect to what.
        batches: This rank's micro-batches; none for an empty shard. Those that count zero are passed over.
        seeds: One random seed per micro-batch.
        build: Makes the graph of one micro-batch.
        move_buffers: Whether BatchNorm's running statistics follow this forward pass.
        retention: Which graphs are kept; all of them by default.

    Attributes:
        loss_sum: ``Σ count·loss``, float64.
        gradient_sum: ``Σ count·gradient``, shape (n,).
        count: ``Σ count``.
        rows: Samples in the shard.
        width: Numbers in the outputs per sample; 0 for an empty shard.
        ran_out: Whether memory has run out while graphs were built, so that fewer are kept.
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
        retention: Retention | None = None,
    ) -> None:
        self._objective, self._parameters = objective, parameters
        self._snapshot = parameters.snapshot()
        self._retention = retention or Retention("all")
        self._rebuild = Rebuild(objective, parameters, build, self._retention)
        self._slots: list[_Slot] = []
        self.rows, self.ran_out = 0, False
        self.gradient_sum = torch.zeros(parameters.numel, dtype=parameters.dtype, device=parameters.device)
        with aside(parameters.device):
            losses = self._build_all(batches, seeds, build, move_buffers=move_buffers)
        self.loss_sum = losses.item()
        self.count = sum(slot.count for slot in self._slots)
        self.width = self._slots[0].width if self._slots else 0
        self._total, self._first_row = 0.0, 0

    def _build_all(
        self, batches: Sequence[Any], seeds: Sequence[int], build: BuildGraph, *, move_buffers: bool
    ) -> Tensor:
        """Build every micro-batch's graph, and keep those that are to be kept; ``Σ count·loss``, 0-dim, float64."""
        objective, parameters = self._objective, self._parameters
        losses = torch.zeros((), dtype=torch.float64, device=parameters.device)
        counts = [_count(objective, j, batch) for j, batch in enumerate(batches)]
        # a gradient alone keeps next to nothing
        bounded = build is not GradientGraph and self._retention.policy != "all"
        sizes = [size_of(batch) for batch, count in zip(batches, counts, strict=True) if count] if bounded else []
        self._retention.look(parameters, sizes)
        for j, (batch, seed, count) in enumerate(zip(batches, seeds, counts, strict=True)):
            with naming_micro_batch(j):
                if count == 0:
                    with contextlib.suppress(UsageError):
                        self.rows += rows(batch)
                    continue
                graph = self._first_graph(batch, seed, sizes, move_buffers=move_buffers)
            losses += graph.loss.double() * count
            for view, piece in zip(parameters.split(self.gradient_sum), graph.gradient, strict=True):
                view.add_(piece, alpha=count)
            graph.gradient = ()
            slot = _Slot(j, count, self.rows, graph.rows, graph.width, batch, seed, graph.loss)
            if self._kept_size() + size_of(batch) <= self._retention.room(sizes):
                slot.graph = graph
            self._slots.append(slot)
            self.rows += graph.rows
            del graph
        return losses

    @property
    def micro_batches(self) -> int:
        """Micro-batches that count."""
        return len(self._slots)

    @property
    def retained(self) -> int:
        """Of these, those whose graphs are kept."""
        return sum(slot.graph is not None for slot in self._slots)

    def begin(self, total: float, first_row: int) -> None:
        """Take the place among all data: the global sample count, and the index of this shard's first row."""
        self._total, self._first_row = total, first_row
        with aside(self._parameters.device):
            for slot in self._slots:
                if slot.graph is not None:
                    with naming_micro_batch(slot.index):
                        slot.graph.begin(first_row + slot.first_row)

    def free_half(self) -> bool:
        """Free half of the kept graphs, since memory has run out, and keep no more from now on; False if none is kept."""
        kept = [slot for slot in self._slots if slot.graph is not None]
        for slot in kept[len(kept) // 2 :]:
            slot.graph = None
        if kept:
            self._retention.shrink(self._kept_size())
        if self._parameters.device.type == "cuda":
            torch.cuda.empty_cache()
        return bool(kept)

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
        self.check()
        with aside(self._parameters.device):
            pieces_of_v = self._parameters.split(v)
            if not self._slots:
                out.zero_()
            for i, slot in enumerate(self._slots):
                with naming_micro_batch(slot.index):
                    self._add_product(
                        slot, pieces_of_v, out, multiply, ready if i == len(self._slots) - 1 else None, first=i == 0
                    )

    def check(self) -> None:
        """Raise StaleGraphError if a parameter has moved since the graphs were built; on a GPU see :meth:`moved`, too."""
        self._snapshot.check()

    def _add_product(
        self,
        slot: _Slot,
        v: Sequence[Tensor],
        out: Tensor,
        multiply: Multiply,
        ready: Callable[[int], None] | None,
        *,
        first: bool,
    ) -> None:
        """One micro-batch's product; a function of its own, so that a graph that is not kept dies with it."""
        weight = slot.count / self._total
        graph = slot.graph if slot.graph is not None else self._rebuilt(slot, v)
        with full_precision(self._parameters.device):
            if ready is not None:
                self._stream(graph, v, weight, out, multiply, ready, first=first)
                return
            pieces = multiply(graph, v, weight)
        if first:
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
        for slot in self._slots:
            with (
                naming_micro_batch(slot.index),
                reproducible(self._objective, self._parameters.device, slot.seed),
                twice_differentiable(self._objective.module, self._parameters.device),
            ):
                weight, first_row = slot.count / self._total, self._first_row + slot.first_row
                add(MicroBatch(slot.batch, slot.rows, weight, first_row), out)

    def moved(self) -> Tensor | None:
        """On a GPU, how many parameters moved by value, as a 0-dim tensor; on a CPU :meth:`product` has looked."""
        return self._snapshot.moved() if self._parameters.device.type != "cpu" else None

    def close(self) -> None:
        """Free the graphs."""
        self._slots.clear()

    def _kept_size(self) -> int:
        return sum(size_of(slot.batch) for slot in self._slots if slot.graph is not None)

    def _first_graph(self, batch: Any, seed: int, sizes: Sequence[int], *, move_buffers: bool) -> Graph:
        """A micro-batch's graph; where memory runs out, kept ones make room for it."""
        while True:
            try:
                if not self._retention.wants_measuring(sizes):
                    return self._rebuild.whole(batch, seed, move_buffers=move_buffers)
                self._rebuild.prepare(batch, seed)
                with counting(self._objective, batch) as storages:
                    graph = self._rebuild.whole(batch, seed, move_buffers=move_buffers)
                storages.hold(graph)
                self._retention.measured(size_of(batch), storages.nbytes)
                return graph
            except Exception as error:
                if not ran_out_of_memory(error) or not self.free_half():
                    raise
                self.ran_out = True
                traceback.clear_frames(error.__traceback__)  # they hold what had been built

    def _rebuilt(self, slot: _Slot, v: Sequence[Tensor]) -> Graph:
        """The graph of a micro-batch that keeps none, for a product with v."""
        graph = self._rebuild(slot.batch, slot.seed, v)
        if not slot.compared:
            slot.compared = True
            _require_same_loss(graph.loss, slot.loss)
        graph.begin(self._first_row + slot.first_row)
        return graph


def _count(objective: Objective, index: int, batch: Any) -> float:
    with naming_micro_batch(index):
        return objective.count(batch)


def _require_same_loss(now: Tensor, before: Tensor) -> None:
    """Refuse an objective that is another one each time it is evaluated: its products would be those of several matrices."""
    slack = torch.finfo(before.dtype).eps ** 0.5
    if not torch.allclose(now, before, rtol=slack, atol=0.0, equal_nan=True):
        raise UsageError(
            f"the loss of a micro-batch is {float(now):g} when its graph is rebuilt, and was {float(before):g} at the same "
            "parameters: something in the module changes with each forward pass; use eval() for it, or keep all graphs with "
            "retain 'all'"
        )


def _hand_on(take: Callable[[int, Tensor], None], i: int, piece: Tensor) -> None:
    """A hook that leaves the gradient as it is."""
    with torch.no_grad():
        take(i, piece)


@dataclasses.dataclass(slots=True)
class _Slot:
    """A micro-batch that counts: its index and the row it begins at within the shard, its data, and its graph if that is kept."""

    index: int
    count: float
    first_row: int
    rows: int
    width: int
    batch: Any
    seed: int
    loss: Tensor
    graph: Graph | None = None
    compared: bool = False
