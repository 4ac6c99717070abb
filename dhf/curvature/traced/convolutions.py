"""Passes over recorded convolutions: biases within, weight gradients by their own kernel, and channels last on a CPU.

Autograd writes the second derivative of a convolution with a weight gradient as a convolution of transposed tensors, of the
image's size, and cuts from it the few numbers that are wanted. And oneDNN's kernels are up to six times as fast where channels
come last; what lies between two convolutions keeps their layout.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from dhf.curvature.traced.cutting import Map
from dhf.curvature.traced.recording import Node

__all__ = ["biases_within", "channels_last", "weight_gradients"]

aten = torch.ops.aten
_CONVOLUTION, _BACKWARD = aten.convolution.default, aten.convolution_backward.default


def weight_gradients(graph: fx.Graph, maps: Sequence[Map]) -> None:
    """Take weight gradients of two-dimensional convolutions by ``convolution_backward``."""
    for node in list(graph.nodes):
        if node.target is not _CONVOLUTION or len(node.meta["shape"]) != 4:
            continue
        x, g, bias, dilation, padding, stride, transposed, _, groups = node.args
        turned = _turned(x), _turned(g), (_turned(next(iter(node.users))) if len(node.users) == 1 else None)
        if None in turned or bias is not None or transposed or groups != 1:
            continue
        x, g = x.args[0], g.args[0]
        whole = next(iter(node.users))  # (output channels, input channels, rows, columns), or some more of these
        wanted = _cut_from(_cut_from(whole, 2), 3)
        with graph.inserting_before(node):
            like = graph.call_function(aten.new_empty.default, (x, list(wanted.meta["shape"])))
            settings = (None, stride, padding, dilation, False, [0, 0], 1, [False, True, False])
            both = graph.call_function(_BACKWARD, (g, x, like, *settings))
            found = graph.call_function(operator.getitem, (both, 1))
        like.meta, both.meta, found.meta = dict(wanted.meta), {"shape": ()}, dict(wanted.meta)
        wanted.replace_all_uses_with(found)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def _turned(node: Any) -> Any:
    """The tensor of which this is the one with the first two dimensions changed, or None."""
    if not isinstance(node, fx.Node) or node.target is not aten.transpose.int:
        return None
    source, *dims = node.args
    return source if dims in ([0, 1], [1, 0]) else None


def _cut_from(node: Node, dim: int) -> Node:
    """The first rows of a dimension, if nothing else of this is used."""
    user: Node = next(iter(node.users), node)
    is_cut = user.target is aten.slice.Tensor and len(node.users) == 1 and len(user.args) == 4
    return user if is_cut and user.args[1] == dim and user.args[2] == 0 else node


def biases_within(graph: fx.Graph, maps: Sequence[Map]) -> None:
    """Add the bias of a convolution's tangent within one of the convolutions that it is added to."""
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if len(node.args) != 2 or node.kwargs:
            continue
        for total, spread in (node.args, node.args[::-1]):
            bias = _bias_of(spread)
            convolution = _convolution_in(total) if bias is not None else None
            if bias is not None and convolution is not None:
                # behind the bias, which is an input: the convolution may stand ahead of its view
                x, weight, _, *settings = convolution.args
                convolution.args = (x, weight, bias, *settings)
                node.replace_all_uses_with(total)
                break
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def _bias_of(node: Any) -> Any:
    """The vector that this spreads over images, or None; only one that is an input, so that it is there everywhere."""
    if not isinstance(node, fx.Node) or node.target is not aten.expand.default or len(node.meta["shape"]) != 4:
        return None
    view = node.args[0]
    if not isinstance(view, fx.Node) or view.target is not aten.view.default:
        return None
    bias: Node = view.args[0]
    channels = node.meta["shape"][1]
    is_spread = bias.meta["shape"] == (channels,) and tuple(view.meta["shape"]) == (1, channels, 1, 1)
    return bias if bias.op == "placeholder" and is_spread else None


def _convolution_in(node: Node) -> Any:
    """A convolution without bias that this is, or is a sum of, and that nothing else uses."""
    if len(node.users) != 1:
        return None
    if node.target is _CONVOLUTION:
        return node if node.args[2] is None else None
    if node.target is aten.add.Tensor and len(node.args) == 2 and not node.kwargs:
        shapes = {a.meta["shape"] for a in node.args if isinstance(a, fx.Node)}
        found = [_convolution_in(a) for a in node.args if isinstance(a, fx.Node)]
        return next((c for c in found if c is not None), None) if shapes == {node.meta["shape"]} else None
    return None


def channels_last(graph: fx.Graph, maps: Sequence[Map]) -> None:
    """Have float32 images on a CPU enter convolutions with channels last."""
    convolutions = [n for n in graph.nodes if n.target in (_CONVOLUTION, _BACKWARD)]
    if not convolutions or graph.find_nodes(op="call_function", target=aten.as_strided.default):
        return
    for node in graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default  # of another layout no view may exist
    placed: dict[Node, Node] = {}
    for node in convolutions:
        images = [a for a in node.args if isinstance(a, fx.Node) and _is_image(a)]
        for image in images:
            if image not in placed:
                with graph.inserting_after(_last_placeholder(graph) if image.op == "placeholder" else image):
                    placed[image] = graph.call_function(
                        aten.contiguous.default, (image,), {"memory_format": torch.channels_last}
                    )
                placed[image].meta = dict(image.meta)
            node.replace_input_with(image, placed[image])


def _is_image(node: Node) -> bool:
    return len(node.meta["shape"]) == 4 and node.meta.get("dtype") == torch.float32 and node.meta.get("device") == "cpu"


def _last_placeholder(graph: fx.Graph) -> Node:
    return graph.find_nodes(op="placeholder")[-1]
