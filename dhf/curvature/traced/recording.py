"""Recording: the tensor operations that a function runs, below autograd, as a torch.fx graph.

What the function computes by autograd, nested or not, arrives here as plain operations. A tensor that is neither an input nor
computed is a constant: it is kept by reference, so that a buffer that is changed in place is read as it is at each replay.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["CannotRecord", "Node", "Recording", "record"]

Node = Any  # a torch.fx.Node, whose arguments would have to be narrowed at every use

_REFUSED = {
    torch.Tag.nondeterministic_seeded: "draws random numbers (dropout)",
    torch.Tag.dynamic_output_shape: "makes tensors whose shape depends on values",
    torch.Tag.data_dependent_output: "reads a value (.item(), or a branch on a tensor)",
}


class CannotRecord(Exception):
    """The function does what a replay could not repeat; the message is a clause that says what."""


class Recording:
    """A graph of tensor operations.

    Attributes:
        graph: Placeholders for inputs and constants, then what is computed; no output node.
        inputs: The inputs' placeholders, in order.
        constants: The constants' placeholders.
        tensors: The tensors that placeholders stand for.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.inputs: list[Node] = []
        self.constants: list[Node] = []
        self.tensors: dict[Node, Tensor] = {}
        self._nodes: Any = WeakTensorKeyDictionary()

    def enter(self, tensor: Tensor, name: str) -> Node:
        """Make a tensor an input that nothing recorded so far has used."""
        node = self._placeholder(f"{name}_{len(self.inputs)}", tensor)
        self.inputs.append(node)
        return node

    def node_of(self, tensor: Tensor) -> Node:
        """The node that computes a tensor, or that of a new constant."""
        node = self._nodes.get(tensor)
        if node is None:
            node = self._placeholder(f"constant_{len(self.constants)}", tensor)
            self.constants.append(node)
        return node

    def _placeholder(self, name: str, tensor: Tensor) -> Node:
        with self._inserting_at_the_top():
            node = self.graph.placeholder(name)
        self.tensors[node] = tensor
        self.note(node, tensor)
        return node

    def _inserting_at_the_top(self) -> Any:
        first = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
        return contextlib.nullcontext() if first is None else self.graph.inserting_before(first)

    def note(self, node: Node, tensor: Tensor) -> None:
        """Remember what computes a tensor, and the tensor's shape, dtype and device."""
        node.meta.update(shape=tuple(tensor.shape), dtype=tensor.dtype, device=tensor.device.type)
        self._nodes[tensor] = node


def record(
    inputs: Sequence[tuple[str, Tensor]], function: Callable[[Recording], Sequence[Tensor]]
) -> tuple[Recording, list[Node]]:
    """Run a function of these tensors, and record it.

    Args:
        inputs: Names and tensors that a replay is given anew.
        function: Returns the tensors that are wanted; may enter further inputs.

    Returns:
        The recording, and the nodes of the wanted tensors.

    Raises:
        CannotRecord: If the function draws random numbers, reads values, or changes tensors that are not its own.
    """
    recording = Recording()
    for name, tensor in inputs:
        recording.enter(tensor, name)
    with _Recorder(recording):
        wanted = function(recording)
    found = [recording.node_of(tensor) for tensor in wanted]
    if any(_mutates(node) for node in recording.graph.nodes):
        return _without_mutations(recording, found)
    return recording, found


class _Recorder(TorchDispatchMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten.index.Tensor or any(i is not None and i.dtype == torch.bool for i in args[1]):
            for tag in func.tags:
                if tag in _REFUSED:
                    raise CannotRecord(f"{_REFUSED[tag]}, by {func}")
        recording = self._recording
        if func._schema.is_mutable:
            for argument, spec in zip(args, func._schema.arguments, strict=False):
                written = spec.alias_info is not None and spec.alias_info.is_write and isinstance(argument, Tensor)
                if written and recording.node_of(argument).op == "placeholder":
                    raise CannotRecord(f"changes a tensor in place that it has not made, by {func}")
        # before the call: what it changes in place is known by the value it had
        replaced = fx.node.map_aggregate((args, kwargs), lambda a: recording.node_of(a) if isinstance(a, Tensor) else a)
        outputs = func(*args, **kwargs)
        tensors = isinstance(outputs, Tensor) or (
            isinstance(outputs, (tuple, list)) and any(isinstance(o, Tensor) for o in outputs)
        )
        if not tensors:
            return outputs
        node = recording.graph.call_function(func, *replaced)
        if isinstance(outputs, Tensor):
            recording.note(node, outputs)
        else:
            for i, output in enumerate(outputs):
                if isinstance(output, Tensor):
                    recording.note(recording.graph.call_function(operator.getitem, (node, i)), output)
        return outputs


def _mutates(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _without_mutations(recording: Recording, wanted: Sequence[Node]) -> tuple[Recording, list[Node]]:
    """The same recording with every operation in place replaced by one that makes a new tensor."""
    # nothing but a replay of the whole, in which views of what is changed are followed, can tell
    changed = _changed_constants(recording)
    if changed:
        raise CannotRecord(f"changes a tensor in place that it has not made, of shape {changed[0].meta['shape']}")
    recording.graph.output(list(wanted))
    module = fx.GraphModule({}, recording.graph)
    again, held = Recording(), {}
    for node in recording.graph.find_nodes(op="placeholder"):
        held[node] = recording.tensors[node].detach()
    for node in recording.inputs:
        again.enter(held[node], node.name)
    with torch.no_grad(), _Recorder(again):
        outputs = torch.func.functionalize(module, remove="mutations")(*held.values())
    found = [again.node_of(output) for output in outputs]
    originals = {id(copy): recording.tensors[node] for node, copy in held.items()}
    again.tensors = {node: originals.get(id(tensor), tensor) for node, tensor in again.tensors.items()}
    return again, found


def _changed_constants(recording: Recording) -> list[Node]:
    """Placeholders whose memory an operation in place writes to, by following views."""
    roots: dict[Node, set[Node]] = {}
    changed = []
    for node in recording.graph.nodes:
        if node.op == "placeholder":
            roots[node] = {node}
        elif isinstance(node.target, torch._ops.OpOverload):
            aliased = [
                a
                for a, spec in zip(node.args, node.target._schema.arguments, strict=False)
                if spec.alias_info is not None and isinstance(a, fx.Node)
            ]
            roots[node] = set().union(*(roots[a] for a in aliased)) if aliased else set()
            if _mutates(node):
                changed += [root for a in aliased for root in roots[a]]
        else:
            roots[node] = set().union(*(roots[a] for a in node.all_input_nodes))
    return changed
