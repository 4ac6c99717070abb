"""cgls: conjugate gradients for least squares, from J and Jᵀ; JᵀJ is never formed.

    minimise ½‖J x - b‖² + ½ damping ‖x‖²,    that is (JᵀJ + damping·I) x = Jᵀb

What differs from conjugate gradients on that system: the curvature along p is ‖J p‖² + damping ‖p‖², a sum of squares that
cannot round below zero, and the residual Jᵀ(b - J x) is taken from rows. What differs from the textbook: between two
replacements that residual is carried by its recurrence, so that an iteration needs one collective, in which ‖J p‖² rides along;
it is taken anew from rows each time it has fallen a hundredfold, as agreed by all, and at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from dhf.errors import UsageError
from dhf.reason import Reason
from dhf.solvers.cg import ConjugateGradients, Replacing
from dhf.solvers.krylov import StoppingRule, check_preconditioner, guarded, run, zero_solution
from dhf.solvers.linear_operator import Agreement, Own
from dhf.solvers.solution import Iteration, Solution
from dhf.vector_space import Replicated, VectorSpace

__all__ = ["cgls"]

_REPLACE = 1e-2


class RowOperator(Protocol):
    """What cgls asks of J: products of A = JᵀJ that tell ‖J v‖², and residuals from rows."""

    space: VectorSpace
    gradient: Tensor
    squared: float

    def apply(
        self, v: Tensor, proposal: Reason | None = None, failure: Exception | None = None, shift: float = 0.0
    ) -> tuple[Tensor, Agreement]:
        """``(JᵀJ + shift·I) v``, leaving ``‖J v‖²`` in :attr:`squared`."""

    def agree(self, proposal: Reason | None, failure: Exception | None = None) -> Agreement:
        """The agreement alone."""

    def residual(
        self, x: Tensor, proposal: Reason | None = None, failure: Exception | None = None
    ) -> tuple[Tensor, Agreement]:
        """``Jᵀ(b - J x)``; its value at zero is ``-gradient``."""


def cgls(
    J: Any,
    b: Tensor | None = None,
    *,
    damping: float = 0.0,
    x0: Tensor | None = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iterations: int | None = None,
    progress_tolerance: float | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    snapshot_ratio: float | None = None,
    callback: Callable[[Iteration], None] | None = None,
) -> Solution:
    """Solve a linear least-squares problem by conjugate gradients, accurately where JᵀJ is ill-conditioned.

    Args:
        J: A ResidualJacobian, or a tensor of shape (m, n).
        b: Right-hand side of shape (m,) where J is a tensor; a ResidualJacobian has its own, minus the residuals.
        damping: Added to the diagonal of JᵀJ; not negative.
        x0: Start, shape (n,); zero by default.
        rtol: Stop when ``‖Jᵀ(b - J x) - damping x‖ ≤ rtol·‖Jᵀb‖``. Dimensionless; 0 turns it off.
        atol: The same in the units of Jᵀb.
        max_iterations: As in :func:`dhf.cg`, as are the next and the last two.
        progress_tolerance: See there.
        preconditioner: ``r -> z ≈ (JᵀJ + damping·I)⁻¹ r``, symmetric positive definite; none by default.
        snapshot_ratio: See there.
        callback: See there.

    Returns:
        A Solution in the terms of the normal equations: residual norms are those of ``Jᵀ(b - J x) - damping x``.

    Raises:
        UsageError: If J is the operator of an objective that is not least squares.
        ValueError: If shapes or dtypes differ, or damping is negative or not finite.

    Source: Björck, Elfving & Strakoš (1998), on attainable accuracy; replacement as in van der Vorst & Ye (2000).

    Example:
        >>> import torch
        >>> J = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
        >>> cgls(J, torch.tensor([1.0, 4.0, 5.0], dtype=torch.float64)).x.round(decimals=12)
        tensor([1., 2.], dtype=torch.float64)
    """
    if not (damping >= 0 and math.isfinite(damping)):
        raise ValueError(f"damping must be finite and not negative, got {damping}")
    check_preconditioner(preconditioner)
    A = _as_rows(J, b)
    rhs = -A.gradient
    if x0 is not None and (x0.shape, x0.dtype, x0.device) != (rhs.shape, rhs.dtype, rhs.device):
        raise ValueError(
            f"x0 must be {rhs.dtype} of shape {tuple(rhs.shape)} on {rhs.device}, got {x0.dtype} {tuple(x0.shape)}"
        )
    norm = math.sqrt(A.space.dots((rhs, rhs))[0])
    stop = StoppingRule.of(norm, A.space.size(rhs), rtol, atol, max_iterations, progress_tolerance, rhs.dtype)
    if norm == 0:
        return zero_solution(rhs)
    recursion = _LeastSquares(A, rhs, damping, x0, guarded(A.space, preconditioner))
    return run(recursion.damped, recursion, stop, x0=x0, snapshot_ratio=snapshot_ratio, callback=callback)


class _LeastSquares(Replacing):
    """Conjugate gradients on the normal equations, given curvatures and residuals from rows."""

    def __init__(
        self,
        A: RowOperator,
        rhs: Tensor,
        damping: float,
        x0: Tensor | None,
        precondition: Callable[[Tensor], Tensor],
    ) -> None:
        self.A, self.damping = A, damping
        self.damped = _Damped(A, damping)
        super().__init__(ConjugateGradients(self.damped, rhs, x0, precondition))

    def ask(self, reason: Reason | None, failure: Exception | None) -> tuple[Tensor, Agreement]:
        self._replacing = reason is Reason.RESIDUAL_REPLACED
        if failure is None and reason is not None:
            x = self.cg.end(reason)[0]
            product, agreed = self.A.residual(x, reason, failure)
            return product.sub_(x, alpha=self.damping), agreed
        return self.damped.apply(self.cg.p, reason, failure)

    def advance(self, product: Tensor) -> Reason | None:
        if self._replacing:
            self._replaced = self.cg.residual_norm
            return self.cg.replace_residual(product)
        pp = self.A.space.dots((self.cg.p, self.cg.p))[0]
        reason = self.cg.step(product, self.A.squared + self.damping * pp, pp, 0.0)
        due = self.cg.residual_norm < _REPLACE * self._replaced
        return Reason.RESIDUAL_REPLACED if reason is None and due else reason

    def residual(self, product: Tensor) -> Tensor:
        return product


class _Damped:
    """``JᵀJ + damping·I``."""

    def __init__(self, A: RowOperator, damping: float) -> None:
        self.A, self.damping, self.space = A, damping, A.space

    def apply(
        self, v: Tensor, proposal: Reason | None = None, failure: Exception | None = None
    ) -> tuple[Tensor, Agreement]:
        return self.A.apply(v, proposal, failure, self.damping)

    def agree(self, proposal: Reason | None, failure: Exception | None = None) -> Agreement:
        return self.A.agree(proposal, failure)


class _Dense:
    """A tensor and a right-hand side, with nobody to agree with."""

    def __init__(self, J: Tensor, b: Tensor) -> None:
        self.J, self.b, self.squared = J, b, 0.0
        self.space: VectorSpace = Replicated()
        self.gradient = -(J.T @ b)

    def apply(
        self, v: Tensor, proposal: Reason | None = None, failure: Exception | None = None, shift: float = 0.0
    ) -> tuple[Tensor, Agreement]:
        if failure is not None:
            raise failure
        Jv = self.J @ v
        self.squared = self.space.dots((Jv, Jv))[0]
        return (self.J.T @ Jv).add_(v, alpha=shift), Own(proposal)

    def agree(self, proposal: Reason | None, failure: Exception | None = None) -> Agreement:
        if failure is not None:
            raise failure
        return Own(proposal)

    def residual(
        self, x: Tensor, proposal: Reason | None = None, failure: Exception | None = None
    ) -> tuple[Tensor, Agreement]:
        if failure is not None:
            raise failure
        return self.J.T @ (self.b - self.J @ x), Own(proposal)


def _as_rows(J: Any, b: Tensor | None) -> RowOperator:
    if isinstance(J, Tensor):
        if J.dim() != 2 or b is None or b.shape != J.shape[:1] or b.dtype != J.dtype or b.device != J.device:
            found = None if b is None else (b.dtype, tuple(b.shape))
            raise ValueError(f"J {J.dtype} of shape {tuple(J.shape)} needs b with one number per row, got {found}")
        if J.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"J must be float32 or float64, got {J.dtype}")
        return _Dense(J, b)
    if not hasattr(J, "residual") or not hasattr(J, "squared"):
        raise UsageError(
            f"cgls needs the rows of a least-squares problem, and {type(J).__name__} has none; use dhf.ResidualJacobian on a "
            "LeastSquares objective, or solve with cg"
        )
    if b is not None:
        raise ValueError("a ResidualJacobian has its own right-hand side, minus the residuals; leave b out")
    return J
