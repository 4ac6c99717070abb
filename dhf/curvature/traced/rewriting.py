"""Passes over a recorded map that make few large matrix products of many small ones; what is computed stays the same.

    Σ_t A_t B_t  =  [A_1 … A_T] [B_1; …; B_T]            weight gradients of a layer that is used at many places
    Σ_t 1ᵀ X_t   =  1ᵀ [X_1; …; X_T]                     bias gradients of the same
    Σ_t e_t ⊗ x_t = [x_1; …; x_T]                        gradients of a tensor of which every step takes its own row
    [C_t V]_t    =  [C_1; …; C_T] V                      one matrix applied to what does not depend on the vector

Recurrent networks over T steps have T of each per layer, and spend more time on these than on all else.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from dhf.curvature.traced.cutting import Map, depending
from dhf.curvature.traced.recording import Node

__all__ = ["add_in_products", "apply_once_to_many", "join_sums"]

aten = torch.ops.aten
_LEAST = 4  # fewer than so many are left as they are
_SMALL = (
    1 << 22
)  # multiplications; of larger products, the time to start them is nothing, and copies of their factors are large


def join_sums(graph: fx.Graph, maps: Sequence[Map]) -> None:
    """Join the matrix products, the sums over rows, and the rows of one tensor, that are terms of one sum."""
    for node in reversed(list(graph.nodes)):
        if _is_sum(node) and not any(_is_sum(user) and _is_inner(node) for user in node.users):
            terms = _terms(node)
            groups = _groups(terms)
            if not groups:
                continue
            joined = {term for group in groups for term in group}
            with graph.inserting_before(node):
                left = [term for term in terms if term not in joined] + [_join(graph, group) for group in groups]
                total = left[0]
                for term in left[1:]:
                    total = _call(graph, aten.add.Tensor, (total, term), node.meta["shape"])
            node.replace_all_uses_with(total)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def _is_sum(node: Node) -> bool:
    """A sum of two tensors of its own shape."""
    return (
        node.target is aten.add.Tensor
        and not node.kwargs
        and len(node.args) == 2
        and all(isinstance(a, fx.Node) and a.meta.get("shape") == node.meta["shape"] for a in node.args)
    )


def _is_small(product: Node) -> bool:
    (m, k), (_, n) = (factor.meta["shape"] for factor in product.args)
    return m * k * n < _SMALL


def _is_inner(node: Node) -> bool:
    return len(node.users) == 1


def _terms(root: Node) -> list[Node]:
    found, stack = [], list(root.args)
    while stack:
        node = stack.pop()
        if _is_sum(node) and _is_inner(node):
            stack += node.args
        else:
            found.append(node)
    return found[::-1]


def _groups(terms: Sequence[Node]) -> list[list[Node]]:
    groups: dict[object, list[Node]] = defaultdict(list)
    for term in dict.fromkeys(terms):
        if terms.count(term) == 1 and _is_inner(term):
            kind = _kind(term)
            if kind is not None:
                groups[kind].append(term)
    return [group for group in groups.values() if len(group) >= _LEAST and _is_whole(group)]


def _is_whole(group: Sequence[Node]) -> bool:
    """Whether rows of one tensor are all of it, each once; other groups always are."""
    if group[0].target is not aten.select_backward.default:
        return True
    _, sizes, dim, _ = group[0].args
    return sorted(term.args[3] for term in group) == list(range(sizes[dim]))


def _kind(term: Node) -> object:
    """What terms must have in common to be joined, or None."""
    if term.target is aten.mm.default:
        return "product" if _is_small(term) else None
    if term.target is aten.select_backward.default:
        return "row", tuple(term.args[1]), term.args[2]
    inner = term.args[0] if term.target is aten.view.default and _is_inner(term.args[0]) else term
    is_sum_of_rows = inner.target is aten.sum.dim_IntList and list(inner.args[1]) == [0]
    if is_sum_of_rows and math.prod(inner.args[0].meta["shape"]) < _SMALL // 16:
        return (
            "rows",
            inner.args[0].meta["shape"][1:],
            inner.args[2:],
            tuple(term.args[1]) if inner is not term else None,
        )
    return None


def _join(graph: fx.Graph, group: list[Node]) -> Node:
    if group[0].target is aten.mm.default:
        left, right = ([term.args[i] for term in group] for i in (0, 1))
        if all(a.target is aten.t.default for a in left):  # side by side, rows stay rows
            A = _transposed(graph, _stacked(graph, [a.args[0] for a in left]))
        else:
            A = _stacked(graph, left, 1)
        return _call(graph, aten.mm.default, (A, _stacked(graph, right)), group[0].meta["shape"])
    if group[0].target is aten.select_backward.default:
        rows = [term.args[0] for term in sorted(group, key=lambda term: term.args[3])]
        return _call(graph, aten.stack.default, (rows, group[0].args[2]), group[0].meta["shape"])
    inner = [term if term.target is aten.sum.dim_IntList else term.args[0] for term in group]
    rows = _stacked(graph, [term.args[0] for term in inner])
    total = _call(graph, aten.sum.dim_IntList, (rows, *inner[0].args[1:]), inner[0].meta["shape"])
    if inner[0] is group[0]:
        return total
    return _call(graph, aten.view.default, (total, group[0].args[1]), group[0].meta["shape"])


def apply_once_to_many(graph: fx.Graph, maps: Sequence[Map]) -> None:
    """Apply one matrix to all that it multiplies and that does not depend on the vector, in one product."""
    for m in maps:
        varying = depending(graph, m.inputs)
        by_matrix: dict[Node, list[Node]] = defaultdict(list)
        for node in graph.nodes:
            if node.target is aten.mm.default:
                C, V = node.args
                if V in varying and C not in varying and _is_small(node):
                    by_matrix[V].append(node)
        for V, products in by_matrix.items():
            if len(products) < _LEAST:
                continue
            Cs = [product.args[0] for product in products]
            with graph.inserting_before(
                products[0]
            ):  # where V is there, and so is all that does not depend on the vector
                rows = [C.meta["shape"][0] for C in Cs]
                whole = _call(graph, aten.mm.default, (_stacked(graph, Cs), V), (sum(rows), V.meta["shape"][1]))
                split = _call(graph, aten.split_with_sizes.default, (whole, rows), ())
                parts = [
                    _call(graph, operator.getitem, (split, i), product.meta["shape"])
                    for i, product in enumerate(products)
                ]
            for part, product in zip(parts, products, strict=True):
                product.replace_all_uses_with(part)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def add_in_products(graph: fx.Graph, maps: Sequence[Map]) -> None:
    """Add to a matrix product within it: ``A B + C`` in one operation."""
    for node in list(graph.nodes):
        if _is_sum(node):
            for product, rest in (node.args, node.args[::-1]):
                if product.target is aten.mm.default and _is_inner(product) and rest is not product:
                    with graph.inserting_before(node):
                        node.replace_all_uses_with(
                            _call(graph, aten.addmm.default, (rest, *product.args), node.meta["shape"])
                        )
                    break
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def _stacked(graph: fx.Graph, nodes: Sequence[Node], dim: int = 0) -> Node:
    shape = list(nodes[0].meta["shape"])
    shape[dim] = sum(node.meta["shape"][dim] for node in nodes)
    return _call(graph, aten.cat.default, (list(nodes), dim), tuple(shape))


def _transposed(graph: fx.Graph, node: Node) -> Node:
    return _call(graph, aten.t.default, (node,), node.meta["shape"][::-1])


def _call(graph: fx.Graph, function: Any, args: tuple[Any, ...], shape: tuple[int, ...]) -> Node:
    node = graph.call_function(function, args)
    like = next(a for a in node.all_input_nodes)
    node.meta.update(like.meta, shape=shape)
    return node
