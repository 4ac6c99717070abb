"""Rebuild: the graph of a micro-batch that keeps none, made anew for one product.

    from scratch    as it was built the first time, whatever the curvature
    along v         z and J v in one forward pass, then Jᵀ by one backward pass: for Gauss-Newton and Fisher matrices

The second costs about 1.6 gradients instead of 2.3, but not every module can carry derivatives forward, and one that hides a
part of itself from backward passes alone (under ``no_grad``) would give another J. So both are tried once, in one direction
through all parameters, and the second is taken if they agree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dhf.curvature.retention import Retention, counting
from dhf.errors import UsageError
from dhf.evaluation import reproducible, twice_differentiable
from dhf.memory import ran_out_of_memory
from dhf.objective import Objective
from dhf.parameters import Parameters

__all__ = ["Rebuild", "retained_bytes"]


class Rebuild:
    """Makes graphs under the random numbers and kernels of the first time.

    Args:
        objective: What is differentiated.
        parameters: With respect to what.
        build: Makes the graph of one micro-batch; may have an ``along(objective, parameters, batch, v)`` that makes one for
            products with v alone.
        retention: Remembers whether ``along`` can be used.
    """

    def __init__(
        self, objective: Objective, parameters: Parameters, build: Callable[..., Any], retention: Retention
    ) -> None:
        self._objective, self._parameters, self._retention = objective, parameters, retention
        self._build, self._along = build, _along_of(build)

    def __call__(self, batch: Any, seed: int, v: Sequence[Tensor]) -> Any:
        """A graph of this micro-batch that is good for products with v."""
        if self._along is None or self._retention.forward_mode is False:
            return self.whole(batch, seed)
        if self._retention.forward_mode is None:
            self._retention.forward_mode = self._agree(batch, seed)
        if self._retention.forward_mode:
            try:
                return self.along(batch, seed, v)
            except (NotImplementedError, RuntimeError) as error:
                if ran_out_of_memory(error):
                    raise
                self._retention.forward_mode = False
        return self.whole(batch, seed)

    def whole(self, batch: Any, seed: int, *, move_buffers: bool = False) -> Any:
        """The graph as it is kept."""
        return self._make(self._build, batch, seed, move_buffers=move_buffers)

    def prepare(self, batch: Any, seed: int) -> None:
        """Do what the first graph of its kind takes besides itself, as a recording, so that it can be measured."""
        prepare = getattr(self._build, "prepare", None)
        if prepare is not None:
            self._make(prepare, batch, seed)

    def along(self, batch: Any, seed: int, v: Sequence[Tensor]) -> Any:
        """The graph for products with v alone."""
        assert self._along is not None
        return self._make(self._along, batch, seed, v)

    def _make(self, build: Callable[..., Any], batch: Any, seed: int, *more: Any, move_buffers: bool = False) -> Any:
        device = self._parameters.device
        with (
            torch.enable_grad(),  # a product may be asked for without
            reproducible(self._objective, device, seed, move_buffers=move_buffers),
            twice_differentiable(self._objective.module, device),
        ):
            return build(self._objective, self._parameters, batch, *more)

    def _agree(self, batch: Any, seed: int) -> bool | None:
        """Whether J v is the same both ways, for one v of ±1; None where that v tells nothing."""
        generator = torch.Generator().manual_seed(0)
        v = [torch.randint(0, 2, p.shape, generator=generator).mul_(2).sub_(1).to(p) for p in self._parameters.tensors]
        try:  # one after the other, so that memory holds one graph at a time
            ahead = self.along(batch, seed, v).push(v).clone()
        except UsageError:
            raise
        except Exception as error:
            if ran_out_of_memory(error):
                raise
            return False
        whole = self.whole(batch, seed).push(v)
        scale = float(torch.linalg.vector_norm(whole))
        if not 0.0 < scale < float("inf"):
            return None
        return bool(torch.linalg.vector_norm(ahead - whole) <= torch.finfo(whole.dtype).eps ** 0.5 * scale)


def retained_bytes(objective: Objective, parameters: Parameters, batch: Any, build: Callable[..., Any]) -> int:
    """Bytes of distinct storage that the graphs of one micro-batch keep alive, parameters and data left out."""
    with counting(objective, batch) as storages:
        graph = Rebuild(objective, parameters, build, Retention("all")).whole(batch, 0)
        storages.hold(graph)
    return storages.nbytes


def _along_of(build: Callable[..., Any]) -> Callable[..., Any] | None:
    """The builder's own ``along``, with the arguments that have been bound to it."""
    if isinstance(build, functools.partial):
        along = _along_of(build.func)
        return None if along is None else functools.partial(along, *build.args, **build.keywords)
    return getattr(build, "along", None)
