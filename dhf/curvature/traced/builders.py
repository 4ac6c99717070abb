"""graph_builder(): how the graph of a micro-batch is made for each way of taking products.

    retained    autograd's own graph, differentiated once more for every product
    traced      the operations of one product, recorded; those that depend on the vector are replayed
    compiled    the same, compiled
    auto        traced where the module has convolutions or recurrent layers, of which autograd's second derivatives are slow (on a
                GPU for Gauss-Newton products alone); retained elsewhere, where a recording saves a few percent

A recording belongs to an objective and to the shapes of a micro-batch, and serves all micro-batches and steps of these shapes.
What cannot be recorded is retained, and what cannot be compiled traced.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dhf.curvature.gauss_newton import GaussNewtonGraph
from dhf.curvature.hessian import HessianGraph
from dhf.curvature.traced.graphs import TracedGaussNewton, TracedHessian, same_products
from dhf.curvature.traced.program import CannotCompile
from dhf.curvature.traced.recording import CannotRecord
from dhf.errors import UsageError
from dhf.evaluation import moving_buffers
from dhf.memory import ran_out_of_memory
from dhf.objective import Objective
from dhf.parameters import Parameters

__all__ = ["PRODUCTS", "graph_builder"]

PRODUCTS = ("retained", "traced", "compiled", "auto")

Program = Any  # of one of the two
_KINDS: dict[type, Any] = {HessianGraph: TracedHessian, GaussNewtonGraph: TracedGaussNewton}
# for each shape of micro-batch its recording, or why there is none
_programs: weakref.WeakKeyDictionary[Objective, dict[Any, Program | str]] = weakref.WeakKeyDictionary()
_SLOW = (torch.nn.modules.conv._ConvNd, torch.nn.RNNBase, torch.nn.RNNCellBase)  # by autograd
_MOST = 16  # recordings of an objective


def graph_builder(kind: type, products: str, tell: Callable[[str], None] | None = None) -> Any:
    """What makes the graph of a micro-batch.

    Args:
        kind: HessianGraph or GaussNewtonGraph.
        products: One of :data:`PRODUCTS`.
        tell: Called with a sentence where products are taken in another way than asked for by name; warns by default.

    Raises:
        UsageError: If there is no such way.
    """
    if products not in PRODUCTS:
        raise UsageError(f"products {products!r} is unknown; choose from {', '.join(PRODUCTS)}")
    return kind if products == "retained" else _Recorded(kind, products, tell or _warn)


def _warn(words: str) -> None:
    warnings.warn(words, stacklevel=2)


class _Recorded:
    def __init__(self, kind: type, products: str, tell: Callable[[str], None]) -> None:
        self._by_rule = products == "auto"
        self._kind, self._products, self._tell = kind, "traced" if self._by_rule else products, tell
        self._said: set[str] = set()
        self.__name__ = f"{self._products} {kind.__name__}"
        along = getattr(kind, "along", None)
        if along is not None:  # a graph for one product is not worth a recording's build
            self.along = along

    def __call__(self, objective: Objective, parameters: Parameters, batch: Any) -> Any:
        if not self._is_for(objective, parameters):
            return self._kind(objective, parameters, batch)
        try:
            data = _tensors(batch)
            program = self._recording_for(objective, parameters, batch, data)
            graph = program.build(objective, parameters, batch, data)
            if graph.agrees and self._is_confirmed(program, graph, objective, parameters, batch):
                return graph
            words = "gives other numbers than its recording: it depends on more than parameters, buffers and batch"
            _programs[objective][self._key(objective, parameters, data, batch)] = words
            raise CannotRecord(words)
        except CannotRecord as refusal:
            try:  # first, for what is wrong with the batch itself
                graph = self._kind(objective, parameters, batch)
            except Exception:
                _programs.pop(objective, None)  # another batch may be recorded
                raise
            self._say(f"products are retained, not {self._products}, since the objective {refusal}")
            return graph

    def _is_for(self, objective: Objective, parameters: Parameters) -> bool:
        if not self._by_rule:
            return True
        gains = parameters.device.type == "cpu" or self._kind is GaussNewtonGraph  # as measured
        return gains and any(isinstance(m, _SLOW) for m in objective.module.modules())

    def _recording_for(
        self, objective: Objective, parameters: Parameters, batch: Any, data: Sequence[Tensor]
    ) -> Program:
        known = _programs.setdefault(objective, {})
        key = self._key(objective, parameters, data, batch)
        if key not in known:
            if len(known) >= _MOST:
                raise CannotRecord(f"comes in more than {_MOST} shapes of micro-batch")
            try:
                known[key] = self._program(objective, parameters, batch, data)
            except CannotRecord as refusal:
                known[key] = refusal.args[0]
        if isinstance(known[key], str):
            raise CannotRecord(known[key])
        return known[key]

    def _say(self, words: str) -> None:
        if words not in self._said and not self._by_rule:
            self._said.add(words)
            self._tell(words)

    def prepare(self, objective: Objective, parameters: Parameters, batch: Any) -> None:
        """Record, if that is still to be done and can be."""
        with contextlib.suppress(CannotRecord):
            if self._is_for(objective, parameters):
                self._recording_for(objective, parameters, batch, _tensors(batch))

    def _is_confirmed(
        self, program: Program, graph: Any, objective: Objective, parameters: Parameters, batch: Any
    ) -> bool:
        """Whether a recording has the objective's products at other parameters, too; looked at where it first meets them.

        What the objective computes past torch, in numpy say, is a constant in a recording.
        """
        if program.confirmed or program.versions == [p._version for p in parameters.tensors]:
            return True
        program.confirmed = same_products(graph, self._kind(objective, parameters, batch), parameters)
        return program.confirmed

    def _program(self, objective: Objective, parameters: Parameters, batch: Any, data: Sequence[Tensor]) -> Program:
        if moving_buffers(objective.module):
            raise CannotRecord("has BatchNorm in training mode, whose statistics move")
        plain = copy.copy(objective)
        plain.check = lambda outputs, batch: None  # type: ignore[method-assign]  # reads values
        try:
            make = functools.partial(_KINDS[self._kind], plain, parameters, batch, data)
            try:
                program = make(compiled=self._products == "compiled")
            except CannotCompile as reason:
                program = make(compiled=False)
                self._say(f"products are traced, not compiled, since {reason}")
        except (CannotRecord, UsageError):
            raise
        except Exception as error:
            if ran_out_of_memory(error):
                raise
            # the objective's own, then it comes again, or something that cannot be recorded
            words = (str(error).splitlines() or [""])[0]
            raise CannotRecord(f"cannot be recorded ({type(error).__name__}: {words})") from error
        return program

    def _key(self, objective: Objective, parameters: Parameters, data: Sequence[Tensor], batch: Any) -> Any:
        firsts = [next(i for i, other in enumerate(data) if other is t) for t in data]
        return (
            self.__name__,
            torch.get_num_threads() if self._products == "compiled" else 0,
            parameters.names,
            tuple((p.shape, p.dtype, p.device) for p in parameters.tensors),
            tuple(module.training for module in objective.module.modules()),
            tuple((i, t.shape, t.stride(), t.dtype, t.device) for i, t in zip(firsts, data, strict=True)),
            _form(batch),
        )


def _tensors(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in order."""
    if isinstance(batch, Tensor):
        return [batch]
    return [tensor for part in _parts(batch) for tensor in _tensors(part)]


def _form(batch: Any) -> Any:
    """What of a batch is no tensor, as something that can be compared."""
    if isinstance(batch, Tensor):
        return None
    if isinstance(batch, Mapping):
        return type(batch), tuple((key, _form(value)) for key, value in batch.items())
    if isinstance(batch, (tuple, list)):
        return type(batch), tuple(map(_form, batch))
    return type(batch), batch


def _parts(batch: Any) -> Sequence[Any]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    if isinstance(batch, (tuple, list)):
        return batch
    if batch is None or isinstance(batch, (bool, int, float, str)):
        return ()
    raise CannotRecord(f"has batches that hold {type(batch).__name__}, in which tensors cannot be found")
