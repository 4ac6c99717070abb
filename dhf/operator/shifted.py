"""Shifted, Compressed: views of an operator on the same graphs: with damping, and with products that take half the traffic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dhf.coordinator import Verdict
from dhf.errors import UsageError
from dhf.estimators import DiagonalEstimate, TraceEstimate, diagonal, trace
from dhf.operator.as_scipy import to_scipy
from dhf.operator.whole import Whole
from dhf.reason import Reason

if TYPE_CHECKING:
    from dhf.operator.global_operator import GlobalOperator

__all__ = ["Compressed", "Shifted"]


class Shifted:
    """``A + damping·I``: a GlobalOperator with a multiple of the identity added.

    Args:
        operator: A.
        damping: Added to the diagonal; finite and not negative.

    Raises:
        UsageError: If the damping is out of range.
    """

    def __init__(self, operator: GlobalOperator, damping: float) -> None:
        if not (damping >= 0 and math.isfinite(damping)):
            raise UsageError(
                f"damping must be finite and not negative, got {damping}; raise it until the solve converges"
            )
        self.operator, self.damping, self.STATUS = operator, float(damping), operator.STATUS
        self.shape, self.dtype, self.device, self.space = (
            operator.shape,
            operator.dtype,
            operator.device,
            operator.space,
        )

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.matvec(v)

    def matvec(self, v: Tensor) -> Tensor:
        """``A v + damping v``, a new tensor of shape (n,)."""
        return self.operator.matvec(v).add_(v, alpha=self.damping)

    def apply(
        self, v: Tensor, proposal: Reason | None = None, failure: Exception | None = None, shift: float = 0.0
    ) -> tuple[Tensor, Verdict]:
        """As :meth:`GlobalOperator.apply`."""
        return self.operator.apply(v, proposal, failure, self.damping + shift)

    def agree(self, proposal: Reason | None, failure: Exception | None = None) -> Verdict:
        """As :meth:`GlobalOperator.agree`."""
        return self.operator.agree(proposal, failure)

    @property
    def queues(self) -> bool:
        """As :attr:`GlobalOperator.queues`."""
        return self.operator.queues

    def start(self, v: Tensor) -> None:
        """As :meth:`GlobalOperator.start`."""
        self.operator.start(v)

    def send(self) -> tuple[Tensor, Tensor, float]:
        """As :meth:`GlobalOperator.send`."""
        product, word, diagonal = self.operator.send()
        return product, word, diagonal + self.damping

    def read(self, status: Sequence[float], v: Tensor) -> Verdict:
        """As :meth:`GlobalOperator.read`."""
        return self.operator.read(status, v)

    def shifted(self, damping: float) -> Shifted:
        """``A + (self.damping + damping)·I``."""
        return Shifted(self.operator, self.damping + damping)

    def trace(self, *, products: int = 60, deflate: bool = True, seed: int = 0) -> TraceEstimate:
        """The trace with its standard error; see :func:`dhf.trace`."""
        return trace(self, products=products, deflate=deflate, seed=seed)

    def diagonal(self, *, products: int = 120, deflate: bool = True, seed: int = 0) -> DiagonalEstimate:
        """The diagonal with its standard errors; see :func:`dhf.diagonal`."""
        return diagonal(self, products=products, deflate=deflate, seed=seed)

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator`` of the same products; see :func:`dhf.operator.to_scipy`."""
        return to_scipy(self)


class Compressed(Shifted):
    """``A + damping·I`` with half the traffic: each rank's share of a product is rounded to bfloat16 on its way.

    The product of a solution, by which a solve learns its true residual, is exact: all ranks first agree to take it. By it,
    :func:`dhf.cg` corrects its residual each time it has fallen tenfold, so that it reaches the same tolerances, in more
    iterations; a solve without ``true_residual`` does not, and ends somewhat apart.

    Args:
        operator: A, with replicated vectors.
        damping: Added to the diagonal.

    Attributes:
        residual_replacement: How far a residual falls before it is replaced.

    Raises:
        UsageError: If vectors are sharded.
    """

    residual_replacement = 0.1

    @property
    def queues(self) -> bool:
        """False: its residuals are taken anew in between."""
        return False

    def __init__(self, operator: GlobalOperator, damping: float = 0.0) -> None:
        super().__init__(operator, damping)
        whole = operator._reduction
        if not isinstance(whole, Whole):
            raise UsageError("products can be compressed where vectors are replicated; leave vectors at replicated")
        self._rounded = whole.rounded(torch.bfloat16)

    def matvec(self, v: Tensor) -> Tensor:
        """``A v + damping v`` as it arrives, a new tensor of shape (n,)."""
        return self.apply(v)[0].clone()

    def apply(
        self, v: Tensor, proposal: Reason | None = None, failure: Exception | None = None, shift: float = 0.0
    ) -> tuple[Tensor, Verdict]:
        """As :meth:`GlobalOperator.apply`; rounded, but for a product that goes with a proposal."""
        if proposal is not None or failure is not None:
            verdict = self.agree(proposal, failure)
            exact = verdict.valid and verdict.reason is proposal
            return super().apply(v, proposal, failure, shift) if exact else (torch.zeros_like(v), verdict)
        operator, damping = self.operator, self.damping + shift
        reduced = operator._reduce(
            operator._multiply, v, None, None, [(v, operator._decay), (v, damping)], by=self._rounded
        )
        return reduced.product, reduced.verdict

    def agree(self, proposal: Reason | None, failure: Exception | None = None) -> Verdict:
        """As :meth:`GlobalOperator.agree`."""
        work = self.operator._reduce(lambda _, target: target.out.zero_(), None, proposal, failure, by=self._rounded)
        return work.verdict

    def shifted(self, damping: float) -> Compressed:
        """``A + (self.damping + damping)·I``."""
        return Compressed(self.operator, self.damping + damping)
