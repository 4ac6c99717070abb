"""What a solver asks of an operator, and how matrices and plain objects are made to answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dhf.reason import Reason
from dhf.vector_space import Replicated, VectorSpace

__all__ = ["AgreeingOperator", "Agreement", "Own", "QueueingOperator", "as_operator", "check_system", "empty_vector"]


class Agreement(Protocol):
    """The answer that comes with a product: why the solve must end, and whether the product is one of one vector."""

    @property
    def reason(self) -> Reason | None:
        """The common reason to end, or None."""

    @property
    def valid(self) -> bool:
        """False if parties multiplied different vectors, so that the product must be taken again."""


class AgreeingOperator(Protocol):
    """An operator whose products carry a proposal to end and bring back what was agreed."""

    space: VectorSpace

    def apply(
        self, v: Tensor, proposal: Reason | None = None, failure: Exception | None = None
    ) -> tuple[Tensor, Agreement]:
        """``A v``, valid until the next product, and the agreement; raises if any party tells of a failure."""

    def agree(self, proposal: Reason | None, failure: Exception | None = None) -> Agreement:
        """The agreement alone; it meets other parties' products as one that is not valid."""


class QueueingOperator(AgreeingOperator, Protocol):
    """One that can be asked for a product on a GPU without waiting for it.

    Attributes:
        queues: Whether it can, as things are; the methods below are for that case.
        STATUS: Numbers in which parties tell what they have seen; all are zero if that is nothing.
    """

    STATUS: int

    @property
    def queues(self) -> bool: ...

    def start(self, v: Tensor) -> None:
        """Launch this party's share of ``A v``; one that is not sent is forgotten with the next product."""

    def send(self) -> tuple[Tensor, Tensor, float]:
        """Sum up what was started last: ``A v`` but for a multiple of v, the status in STATUS numbers, and that multiple."""

    def read(self, status: Sequence[float], v: Tensor) -> Agreement:
        """The agreement in these numbers, about a product of v; raises if any party tells of a failure."""


@dataclasses.dataclass(frozen=True, slots=True)
class Own:
    """The agreement of one party with itself."""

    reason: Reason | None
    valid: bool = True


class _Alone:
    """An operator with nobody to agree with: what is proposed is agreed."""

    def __init__(self, operator: Any) -> None:
        self._operator = operator
        self.space: VectorSpace = getattr(operator, "space", None) or Replicated()

    def apply(
        self, v: Tensor, proposal: Reason | None = None, failure: Exception | None = None
    ) -> tuple[Tensor, Agreement]:
        if failure is not None:
            raise failure
        multiply = getattr(self._operator, "matvec", None) or self._operator.__matmul__
        return multiply(v), Own(proposal)

    def agree(self, proposal: Reason | None, failure: Exception | None = None) -> Agreement:
        if failure is not None:
            raise failure
        return Own(proposal)


def as_operator(operator: Any) -> AgreeingOperator:
    """A GlobalOperator as it is; a square tensor, or any object with ``matvec`` or ``@``, wrapped.

    Raises:
        TypeError: If the object cannot multiply a vector.
    """
    if hasattr(operator, "apply") and hasattr(operator, "space"):
        return operator
    if isinstance(operator, Tensor) and (operator.dim() != 2 or operator.shape[0] != operator.shape[1]):
        raise ValueError(f"expected a square matrix, got a tensor of shape {tuple(operator.shape)}")
    if type(operator).__module__ == "numpy":  # its @ takes no tensors
        raise TypeError("a NumPy array cannot be an operator; use torch.as_tensor(A)")
    if not hasattr(operator, "matvec") and not hasattr(operator, "__matmul__"):
        raise TypeError(f"{type(operator).__name__} has neither matvec(v) nor @, so it cannot be an operator")
    return _Alone(operator)


def check_system(operator: Any, b: Tensor, x0: Tensor | None) -> None:
    """Raise ValueError, or TypeError for what is no tensor, unless operator, right-hand side and start fit one another."""
    if not isinstance(b, Tensor):
        raise TypeError(f"the right-hand side must be a tensor, got {type(b).__name__}; use torch.as_tensor(b)")
    if b.dim() != 1:
        raise ValueError(f"the right-hand side must have shape (n,), got {tuple(b.shape)}; solve_many takes several")
    if b.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the right-hand side must be float32 or float64, got {b.dtype}")
    shape, space = getattr(operator, "shape", None), getattr(operator, "space", None)
    n = len(b) if space is None else space.size(b)
    if shape is not None and tuple(shape) != (n, n):
        raise ValueError(f"the operator has shape {tuple(shape)}, the right-hand side {tuple(b.shape)}")
    for name in ("dtype", "device"):
        found = getattr(operator, name, None)
        if isinstance(found, (torch.dtype, torch.device)) and found != getattr(b, name):
            raise ValueError(f"the operator's {name} is {found}, the right-hand side's {getattr(b, name)}")
    if x0 is not None and (x0.shape, x0.dtype, x0.device) != (b.shape, b.dtype, b.device):
        raise ValueError(
            f"x0 is {x0.dtype} of shape {tuple(x0.shape)} on {x0.device}, the right-hand side {b.dtype} of shape "
            f"{tuple(b.shape)} on {b.device}"
        )


def empty_vector(operator: Any, like: Tensor | None = None) -> Tensor:
    """A vector of shape (n,) without values, of the operator's dtype and device, or of those of ``like``.

    An operator that has no dtype is taken for float64, one without a device for the CPU's.

    Raises:
        ValueError: If the operator has no shape and none is given by ``like``, or they differ.
    """
    if like is not None:
        check_system(operator, like, None)
        return torch.empty_like(like)
    shape = getattr(operator, "shape", None)
    if shape is None or len(shape) != 2:
        raise ValueError(f"{type(operator).__name__} has no shape (n, n), and so n is not known; give it one")
    dtype, device = getattr(operator, "dtype", None), getattr(operator, "device", None)
    return torch.empty(
        shape[0],
        dtype=dtype if isinstance(dtype, torch.dtype) else torch.float64,
        device=device if isinstance(device, torch.device) else None,
    )
