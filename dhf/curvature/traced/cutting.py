"""Cutting a recording by what depends on the vector: a build, run once, and maps, run for every vector.

    build   (parameters, data, constants)  ->  heads, residuals
    map     (what it needs of all these, vector)  ->  its outputs

What does not depend on the vector is computed in the build, but for views of a residual where those are asked for in the map.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import fx

from dhf.curvature.traced.recording import Node, Recording

__all__ = ["Cut", "Map", "cut", "depending", "simplified"]

aten = torch.ops.aten
_IDENTITIES = {aten.detach.default, aten.alias.default}


@dataclasses.dataclass(frozen=True, slots=True)
class Map:
    """One linear map within a recording.

    Attributes:
        inputs: Placeholders of the vector's tensors.
        outputs: Nodes of the results.
    """

    inputs: Sequence[Node]
    outputs: Sequence[Node]


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """The pieces of a recording.

    Attributes:
        build: Takes all inputs and constants; gives the heads, then the residuals.
        residuals: How many there are.
        maps: Graphs of the maps.
        needs: For each map the indices of what it takes ahead of its vector: below 0 residuals, counted from -1 down; else inputs
            and constants.
    """

    build: fx.Graph
    residuals: int
    maps: Sequence[fx.Graph]
    needs: Sequence[Sequence[int]]


Rewrite = Callable[[fx.Graph, Sequence[Map]], None]


def cut(
    recording: Recording,
    given: Sequence[Node],
    heads: Sequence[Node],
    maps: Sequence[Map],
    rewrites: Sequence[Rewrite] = (),
    *,
    views_in_maps: bool,
) -> Cut:
    """Cut a recording.

    Args:
        recording: Of inputs and constants; its graph is used up.
        given: Placeholders that a build is given, in order.
        heads: Nodes whose values the build returns.
        maps: What is run for every vector.
        rewrites: Passes over the graph that keep what it computes.
        views_in_maps: Whether a view of a residual is taken in the map, for a compiler to see through, or once in the build.
    """
    late = depending(recording.graph, [n for m in maps for n in m.inputs])
    graph, place = simplified(recording.graph, [*heads, *(o for m in maps for o in m.outputs)], late)
    given, heads = [place[n] for n in given], [place[n] for n in heads]
    maps = [Map([place[n] for n in m.inputs], [place[n] for n in m.outputs]) for m in maps]
    for rewrite in rewrites:
        rewrite(graph, maps)
        (output,) = graph.find_nodes(op="output")
        wanted = iter(output.args[0])
        heads = [next(wanted) for _ in heads]
        maps = [Map(m.inputs, [next(wanted) for _ in m.outputs]) for m in maps]
        graph.eliminate_dead_code()
    varying = [depending(graph, m.inputs) for m in maps]
    residuals: dict[Node, int] = {}
    index = {node: i for i, node in enumerate(given)}
    pieces, needs = [], []
    for m, own in zip(maps, varying, strict=True):
        piece, taken = _map_graph(graph, m, own, views_in_maps=views_in_maps)
        pieces.append(piece)
        needs.append([index[n] if n in index else -1 - residuals.setdefault(n, len(residuals)) for n in taken])
    build = _build_graph(graph, given, [*heads, *residuals], set().union(*varying))
    return Cut(build, len(residuals), pieces, needs)


def depending(graph: fx.Graph, inputs: Iterable[Node]) -> set[Node]:
    """The nodes that depend on these, themselves included."""
    found = set(inputs)
    for node in graph.nodes:
        if node.op != "output" and any(a in found for a in node.all_input_nodes):
            found.add(node)
    return found


def simplified(graph: fx.Graph, wanted: Sequence[Node], late: set[Node]) -> tuple[fx.Graph, dict[Node, Node]]:
    """The graph with these outputs, without repeated, unused and idle operations; and where its nodes have gone.

    What is ``late`` stands behind all that is not, inputs excepted.
    """
    new = fx.Graph()
    place: dict[Node, Node] = {}
    seen: dict[object, Node] = {}
    for node in sorted(graph.nodes, key=lambda n: n.op != "placeholder" and 1 + (n in late)):
        if node.target in _IDENTITIES:
            place[node] = place[node.args[0]]
            continue
        if node.target is aten.t.default and place[node.args[0]].target is aten.t.default:
            place[node] = place[node.args[0]].args[0]
            continue
        key = (node.target, _key(node.args, place), _key(node.kwargs, place)) if node.op == "call_function" else node
        if key not in seen:
            seen[key] = new.node_copy(node, lambda n: place[n])
            seen[key].meta = dict(node.meta)
        place[node] = seen[key]
    new.output([place[node] for node in wanted])
    new.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    return new, place


def _key(argument: object, place: dict[Node, Node]) -> object:
    if isinstance(argument, fx.Node):
        return place[argument]
    if isinstance(argument, (list, tuple)):
        return tuple(_key(a, place) for a in argument)
    if isinstance(argument, dict):
        return tuple((name, _key(a, place)) for name, a in argument.items())
    return type(argument), repr(argument)  # 1, 1.0 and True are not the same


def _is_view(node: Node) -> bool:
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and _is_view(node.args[0])
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    returned = node.target._schema.returns
    return bool(returned) and returned[0].alias_info is not None


def _map_graph(graph: fx.Graph, m: Map, varying: set[Node], *, views_in_maps: bool) -> tuple[fx.Graph, list[Node]]:
    """What of the graph depends on the map's vector, and the nodes that it takes from outside, in order."""
    needed, stack = set(), list(m.outputs)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += node.all_input_nodes if node in varying or (views_in_maps and _is_view(node)) else []
    inside = {n for n in needed if n in varying or (views_in_maps and _is_view(n))}
    taken = [n for n in graph.nodes if n in needed and n not in inside]
    new, place = fx.Graph(), {}
    for node in (*taken, *m.inputs):
        place[node] = new.placeholder(node.name)
    for node in graph.nodes:
        if node in inside and node not in place:
            place[node] = new.node_copy(node, lambda n: place[n])
    new.output([place[node] for node in m.outputs])
    return new, taken


def _build_graph(graph: fx.Graph, given: Sequence[Node], wanted: Sequence[Node], varying: set[Node]) -> fx.Graph:
    new, place = fx.Graph(), {}
    for node in given:
        place[node] = new.placeholder(node.name)
    for node in graph.nodes:
        if node not in varying and node not in place and node.op == "call_function":
            place[node] = new.node_copy(node, lambda n: place[n])
    new.output([place[node] for node in wanted])
    new.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    return new
