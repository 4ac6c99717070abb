"""TracedHessian, TracedGaussNewton: recordings of the products of one micro-batch, and the graphs that they build for others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dhf.curvature.gauss_newton import Jacobian, loss_in_outputs
from dhf.curvature.gradient import rows_and_width
from dhf.curvature.hessian import HessianGraph
from dhf.curvature.traced.cutting import Map
from dhf.curvature.traced.program import Program
from dhf.curvature.traced.recording import CannotRecord, Recording, record
from dhf.objective import Objective
from dhf.parameters import Parameters

__all__ = ["TracedGaussNewton", "TracedHessian", "same_products"]


class TracedHessian:
    """``(θ, batch) -> loss, ∇f`` and ``v -> H v``, recorded and run once for comparison.

    Attributes:
        versions: Of the parameters, when it was recorded.
        confirmed: Whether it has been compared at others.

    Raises:
        CannotRecord: If the objective does what cannot be replayed, or the replay gives other numbers.
    """

    def __init__(
        self, objective: Objective, parameters: Parameters, batch: Any, data: Sequence[Tensor], *, compiled: bool
    ) -> None:
        self.confirmed, self.versions = False, [p._version for p in parameters.tensors]
        v = _random_like(parameters.tensors)
        first: list[Tensor] = []

        def function(_: Recording) -> Sequence[Tensor]:
            graph = HessianGraph(objective, parameters, batch)
            first.extend([graph.loss, *graph.gradient, *graph.product(v)])
            return first

        recording, found = record(_named(parameters, data, v=v), function)
        n, vector = len(v), recording.inputs[-len(v) :]
        self._program = Program(recording, found[: 1 + n], [Map(vector, found[1 + n :])], compiled=compiled)
        heads, built = self._program.build(_inputs(parameters, data))
        self._program.compile_maps(built, [v])
        _compare([*heads, *self._program.apply(0, built, v)], first)

    def build(self, objective: Objective, parameters: Parameters, batch: Any, data: Sequence[Tensor]) -> _HessianReplay:
        """The graph of another micro-batch of the same shapes."""
        return _HessianReplay(self._program, objective, parameters, batch, data)


class _HessianReplay:
    """What one micro-batch keeps; ``agrees`` says whether the objective itself has the same loss."""

    def __init__(
        self, program: Program, objective: Objective, parameters: Parameters, batch: Any, data: Sequence[Tensor]
    ) -> None:
        z = _outputs_of(objective, batch)
        objective.check(z, batch)  # first: the recording does not know what a wrong batch is
        (self.loss, *gradient), self._built = program.build(_inputs(parameters, data))
        self.gradient: Sequence[Tensor] = gradient
        self.agrees = _close(self.loss, objective.loss(z, batch).reshape(()))
        self.rows, self.width = rows_and_width(z)
        self._program = program

    def begin(self, first_row: int) -> None:
        """The Hessian does not depend on where the micro-batch stands among all data."""

    def product(self, v: Sequence[Tensor]) -> Sequence[Tensor]:
        """``H v``, one tensor per parameter, from one tensor per parameter."""
        return self._program.apply(0, self._built, v)


class TracedGaussNewton:
    """``(θ, batch) -> z`` and ``v -> J v``, ``u -> Jᵀu``, recorded and run once for comparison.

    The loss of the outputs, its slope and its Hessian are not recorded. Attributes as those of TracedHessian.

    Raises:
        CannotRecord: If the objective does what cannot be replayed, or the replay gives other numbers.
    """

    def __init__(
        self, objective: Objective, parameters: Parameters, batch: Any, data: Sequence[Tensor], *, compiled: bool
    ) -> None:
        self.confirmed, self.versions = False, [p._version for p in parameters.tensors]
        v = _random_like(parameters.tensors)
        u: list[Tensor] = []
        first: list[Tensor] = []

        def function(recording: Recording) -> Sequence[Tensor]:
            z = objective.outputs(batch)
            u.extend(_random_like([z]))
            recording.enter(u[0], "u")
            jacobian = Jacobian(objective, z, parameters.tensors, torch.ones_like(z))
            first.extend([z.detach(), jacobian.push(v), *jacobian.pull(u[0])])
            return first

        recording, found = record(_named(parameters, data, v=v), function)
        inputs = recording.inputs
        maps = [Map(inputs[-1 - len(v) : -1], [found[1]]), Map(inputs[-1:], found[2:])]
        self._program = Program(recording, found[:1], maps, compiled=compiled)
        heads, built = self._program.build(_inputs(parameters, data))
        self._program.compile_maps(built, [v, u])
        _compare([*heads, *self._program.apply(0, built, v), *self._program.apply(1, built, u)], first)

    def build(
        self, objective: Objective, parameters: Parameters, batch: Any, data: Sequence[Tensor]
    ) -> _GaussNewtonReplay:
        """The graph of another micro-batch of the same shapes."""
        return _GaussNewtonReplay(self._program, objective, parameters, batch, data)


class _GaussNewtonReplay:
    """What one micro-batch keeps; ``agrees`` says whether the objective itself has the same outputs."""

    def __init__(
        self, program: Program, objective: Objective, parameters: Parameters, batch: Any, data: Sequence[Tensor]
    ) -> None:
        self._program = program
        z = _outputs_of(objective, batch)
        objective.check(z, batch)
        (self.outputs,), self._built = program.build(_inputs(parameters, data))
        self.agrees = _close(self.outputs, z)
        self.loss, self.slope, self.output_hessian = loss_in_outputs(objective, parameters, self.outputs, batch)
        self.rows, self.width = rows_and_width(self.outputs)
        self.gradient: Sequence[Tensor] = self.pull(self.slope)

    def begin(self, first_row: int) -> None:
        """The Gauss-Newton matrix does not depend on where the micro-batch stands among all data."""

    def product(self, v: Sequence[Tensor]) -> Sequence[Tensor]:
        """``G v``, one tensor per parameter, from one tensor per parameter."""
        return self.pull(self.output_hessian(self.push(v)))

    def push(self, v: Sequence[Tensor]) -> Tensor:
        """``J v``, of the outputs' shape."""
        return self._program.apply(0, self._built, v)[0]

    def pull(self, u: Tensor) -> Sequence[Tensor]:
        """``Jᵀ u``, one tensor per parameter, from a tensor of the outputs' shape."""
        return self._program.apply(1, self._built, [u])


def same_products(graph: Any, other: Any, parameters: Parameters) -> bool:
    """Whether two graphs of one micro-batch multiply alike."""
    v = _random_like(parameters.tensors)
    return all(map(_close, graph.product(v), other.product(v)))


def _outputs_of(objective: Objective, batch: Any) -> Tensor:
    """The outputs as the objective itself finds them."""
    with torch.enable_grad():  # they may hold a torch.autograd.grad of their own
        return objective.outputs(batch).detach()


def _named(parameters: Parameters, data: Sequence[Tensor], **vectors: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    groups = {"parameter": parameters.tensors, "data": _distinct(data), **vectors}
    return [(name, tensor) for name, tensors in groups.items() for tensor in tensors]


def _inputs(parameters: Parameters, data: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach() for t in (*parameters.tensors, *_distinct(data))]


def _distinct(data: Sequence[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in data}.values())


def _random_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    generator = np.random.default_rng(0)  # not torch's: that cannot be drawn from in a recording
    return [torch.from_numpy(generator.standard_normal(tuple(t.shape))).to(t.device, t.dtype) for t in tensors]


def _compare(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        if not _close(ours, theirs):
            raise CannotRecord("gives other numbers when it is replayed")


def _close(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are the same but for rounding; NaN is the same as NaN."""
    if found.shape != expected.shape:
        return False
    slack = 30 * torch.finfo(found.dtype).eps ** 0.5
    difference = torch.where(found == expected, 0, found - expected).nan_to_num(0.0)
    both = found.isfinite() == expected.isfinite()
    size = expected.nan_to_num(0.0, 0.0, 0.0)
    return bool(both.all()) and float(difference.norm()) <= slack * float(size.norm()) + torch.finfo(found.dtype).tiny
