"""Program: a recording that is run: once per micro-batch and step to build, and for every vector to multiply."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dhf.curvature.traced.convolutions import biases_within, channels_last, weight_gradients
from dhf.curvature.traced.cutting import Cut, Map, cut
from dhf.curvature.traced.recording import Node, Recording
from dhf.curvature.traced.rewriting import add_in_products, apply_once_to_many, join_sums

__all__ = ["Built", "CannotCompile", "Program"]

Built = list[list[Tensor]]  # what a build has left for each map
Function = Callable[..., Sequence[Tensor]]
PASSES = [join_sums, apply_once_to_many, add_in_products, weight_gradients, biases_within, channels_last]
_LONGEST = 1000  # operations; a compiler takes minutes for more


class CannotCompile(Exception):
    """A recording that is to be replayed one operation at a time; the message is a clause that says why."""


class Program:
    """The pieces of a recording, as functions.

    Args:
        recording: Used up.
        heads: Nodes whose values a build returns.
        maps: What is run for every vector.
        compiled: Whether by the compiler, or one operation at a time.

    Raises:
        CannotCompile: If the compiler fails, or would take too long.
    """

    def __init__(self, recording: Recording, heads: Sequence[Node], maps: Sequence[Map], *, compiled: bool) -> None:
        self._constants = [recording.tensors[node].detach() for node in recording.constants]
        given = [*recording.inputs, *recording.constants]
        vectors = {node for m in maps for node in m.inputs}
        given = [node for node in given if node not in vectors]
        self._heads = len(heads)
        self._cut: Cut = cut(recording, given, heads, maps, PASSES, views_in_maps=compiled)
        self._build = _runnable(self._cut.build)
        self._maps: list[Function] = [_runnable(graph) for graph in self._cut.maps]
        self._uncompiled = compiled
        for graph in (self._cut.build, *self._cut.maps):
            if compiled and len(graph.nodes) > _LONGEST:
                raise CannotCompile(f"it has {len(graph.nodes):,} operations, too many to compile")

    @torch.no_grad()
    def build(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], Built]:
        """The heads' values, and what the maps need, from the inputs."""
        given = [*inputs, *self._constants]
        if self._uncompiled:
            self._build = _compiled(self._cut.build, given)
        values = list(self._build(*given))
        residuals = values[self._heads :]
        taken = [[given[i] if i >= 0 else residuals[-1 - i] for i in needed] for needed in self._cut.needs]
        return values[: self._heads], taken

    @torch.no_grad()
    def apply(self, index: int, built: Built, vector: Sequence[Tensor]) -> Sequence[Tensor]:
        """A map's outputs."""
        return self._maps[index](*built[index], *vector)

    @torch.no_grad()
    def compile_maps(self, built: Built, vectors: Sequence[Sequence[Tensor]]) -> None:
        """Compile the maps for what a build has left, whose strides are the compiler's own."""
        if self._uncompiled:
            pieces = zip(self._cut.maps, built, vectors, strict=True)
            self._maps = [_compiled(graph, [*taken, *vector]) for graph, taken, vector in pieces]
            self._uncompiled = False


def _runnable(graph: fx.Graph) -> Function:
    graph.lint()
    return fx.GraphModule({}, graph).forward


def _compiled(graph: fx.Graph, example: Sequence[Tensor]) -> Function:
    from torch import _inductor  # takes a second to import

    try:
        function: Any = _inductor.compile(fx.GraphModule({}, graph), list(example))
    except Exception as error:
        words = (str(error).splitlines() or [""])[0]
        raise CannotCompile(f"the compiler fails ({type(error).__name__}: {words})") from error
    return function
