"""Product: what every contender of products.py hands back, products with one curvature matrix of one network."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from networks import Case
from torch import Tensor

__all__ = ["GAUSS_NEWTON", "HESSIAN", "Pieces", "Product", "Unavailable", "model_of", "without_idle"]

HESSIAN, GAUSS_NEWTON = "Hessian", "Gauss-Newton"


class Unavailable(Exception):
    """This contender has no such products; the message says why, and stands on the page."""


def _nothing() -> None:
    pass


def _same(v: Any) -> Any:
    return v


@dataclasses.dataclass(frozen=True)
class Product:
    """Products that can be taken now; what was spent until here is the build.

    Attributes:
        multiply: The product, of a vector in the contender's own form, and into it. This is what is timed.
        prepare: A flat vector in that form.
        flatten: The flat vector of a result.
        close: Frees what is kept.
        memory: Bytes held between products and at the peak of one, where torch's allocator does not see them.
    """

    multiply: Callable[[Any], Any]
    prepare: Callable[[Tensor], Any] = _same
    flatten: Callable[[Any], Tensor] = _same
    close: Callable[[], None] = _nothing
    memory: Callable[[], tuple[int, int]] | None = None


class Pieces:
    """Flat vectors over all parameters of a module, and lists of tensors over those that are trained."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._all = list(module.parameters())
        self.tensors = [p for p in self._all if p.requires_grad]

    def split(self, v: Tensor) -> list[Tensor]:
        """One tensor per trained parameter."""
        parts = v.split([p.numel() for p in self._all])
        return [part.view_as(p) for part, p in zip(parts, self._all, strict=True) if p.requires_grad]

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The flat vector, zero where nothing is trained."""
        found = iter(pieces)
        return torch.cat([(next(found) if p.requires_grad else torch.zeros_like(p)).reshape(-1) for p in self._all])


_EXAMINED: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def without_idle(case: Case) -> Case:
    """The case with parameters frozen that its loss does not depend on, for those who cannot take them.

    The last bias of a network of which only derivatives are taken is one; rows and columns of the matrix are zero there.
    They are looked for once per module, so that no later build pays for it.
    """
    if case.module not in _EXAMINED:
        tensors = list(case.module.parameters())
        loss = case.loss(case.module(case.inputs), case.targets)
        for p, g in zip(tensors, torch.autograd.grad(loss, tensors, allow_unused=True), strict=True):
            p.requires_grad_(g is not None)
        _EXAMINED.add(case.module)
    return case


def model_of(case: Case) -> Callable[..., Tensor]:
    """``(parameters by name, inputs) -> outputs``."""
    return lambda parameters, x: torch.func.functional_call(case.module, parameters, (x,))
