"""direct: dense symmetric systems by factorisation; one matrix serves every damping that a step tries.

    (G + μI) x = b                                       G given
    (RᵀR + μI) x = Rᵀy + c,  K = RRᵀ:
    x = Rᵀ(K + μI)⁻¹ y + (c - Rᵀ(K + μI)⁻¹ R c)/μ         K given, which never cancels in the part that comes from rows

A matrix that is positive definite to working accuracy takes a Cholesky factorisation per damping, at a tenth of the cost of an
eigendecomposition; one that is not takes one eigendecomposition, which then serves all.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dhf.reason import Reason
from dhf.solvers.krylov import zero_solution
from dhf.solvers.solution import Iterate, Iteration, Solution
from dhf.vector_space import Replicated

__all__ = ["Direct", "direct"]


def direct(A: Any, b: Tensor | None = None, *, damping: float = 0.0) -> Solution:
    """Solve ``(A + damping·I) x = b`` for a dense symmetric positive semi-definite matrix.

    Args:
        A: A tensor of shape (n, n), or a NormalMatrix, which has its own right-hand side.
        b: Right-hand side, shape (n,), where A is a tensor.
        damping: Added to the diagonal; finite and not negative.

    Returns:
        A Solution of one iteration. Its reason is RESIDUAL_TOLERANCE where the residual is that of a stable factorisation;
        LEAST_SQUARES_SOLUTION for the least-norm least-squares solution of a singular system without one;
        NEGATIVE_CURVATURE, x zero and ``direction`` an eigenvector, where ``A + damping·I`` is indefinite.

    Raises:
        ValueError: If shapes or dtypes differ, or damping is out of range.

    Example:
        >>> import torch
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
        >>> direct(A, torch.tensor([3.0, 4.0], dtype=torch.float64)).x.round(decimals=12)
        tensor([1., 1.], dtype=torch.float64)
    """
    return Direct(A, b).solve(damping)


class Direct:
    """A matrix with its right-hand side, to be solved with any number of dampings; arguments as :func:`direct`."""

    def __init__(self, A: Any, b: Tensor | None = None) -> None:
        if isinstance(A, Tensor):
            if A.dim() != 2 or A.shape[0] != A.shape[1]:
                raise ValueError(f"expected a square matrix, got a tensor of shape {tuple(A.shape)}")
            if b is None or b.shape != A.shape[:1] or b.dtype != A.dtype or b.device != A.device:
                found = "none" if b is None else f"{b.dtype} of shape {tuple(b.shape)}"
                raise ValueError(f"a matrix {A.dtype} of shape {tuple(A.shape)} needs b to match, got {found}")
            self.matrix, self.right, self.shift = A, b, 0.0
            self.rows: Tensor | None = None
            self.right_rows: Tensor | None = None
            self.b = b
        else:
            if b is not None:
                raise ValueError("a NormalMatrix has its own right-hand side, minus the gradient; leave b out")
            self.matrix, self.right, self.shift = A.matrix, A.right, A.shift
            self.rows, self.right_rows = A.rows, A.right_rows
            self.b = -A.gradient
        self._eigen: tuple[Tensor, Tensor] | None = None
        self._space = Replicated()

    def solve(self, damping: float) -> Solution:
        """The solution for one damping."""
        if not (damping >= 0 and math.isfinite(damping)):
            raise ValueError(f"damping must be finite and not negative, got {damping}")
        b_norm = self._norm(self.b)
        if b_norm == 0:
            return zero_solution(self.b)
        if not math.isfinite(b_norm + float(self.matrix.sum())):
            return self._solution(torch.zeros_like(self.b), Reason.NON_FINITE, damping)
        mu = damping + self.shift
        if self.rows is None:
            x, reason, direction = self._invert(self.right, mu)
        else:
            assert self.right_rows is not None
            y, reason, direction = self._invert(self.right_rows, mu)
            x = self.rows.T @ y
            if self.right.any():
                y, *_ = self._invert(self.rows @ self.right, mu)
                x = x + (self.right - self.rows.T @ y) / mu
        return self._solution(x, reason, damping, direction)

    def _invert(self, b: Tensor, mu: float) -> tuple[Tensor, Reason, Tensor | None]:
        """``(matrix + mu I)⁻¹ b``."""
        if self._eigen is None:
            shifted = self.matrix.clone()
            shifted.diagonal().add_(mu)
            factor, info = torch.linalg.cholesky_ex(shifted)
            if not int(info):
                return torch.cholesky_solve(b.unsqueeze(1), factor)[:, 0], Reason.RESIDUAL_TOLERANCE, None
            values, vectors = torch.linalg.eigh(self.matrix)
            self._eigen = values, vectors
        values, vectors = self._eigen
        rounding = len(values) * torch.finfo(values.dtype).eps * float(values.abs().max())
        if float(values[0]) + mu < -rounding:
            return torch.zeros_like(b), Reason.NEGATIVE_CURVATURE, vectors[:, 0].clone()
        shifted_values = values.clamp(min=0) + mu
        kept = shifted_values > rounding
        coefficients = vectors.T @ b
        x = vectors @ torch.where(kept, coefficients / shifted_values.where(kept, 1.0), 0.0)
        lost = self._norm(coefficients.where(~kept, 0.0))
        inconsistent = lost > math.sqrt(torch.finfo(b.dtype).eps) * self._norm(b)
        return x, Reason.LEAST_SQUARES_SOLUTION if inconsistent else Reason.RESIDUAL_TOLERANCE, None

    def _solution(self, x: Tensor, reason: Reason, damping: float, direction: Tensor | None = None) -> Solution:
        Ax = self._multiply(x, damping)
        r = self.b - Ax
        xx, xAx, bx, rr = self._space.dots((x, x), (x, Ax), (self.b, x), (r, r))
        norm, model = math.sqrt(rr), 0.5 * xAx - bx
        if reason is Reason.RESIDUAL_TOLERANCE:
            scale = (float(self.matrix.diagonal().sum()) + damping) * math.sqrt(xx) + self._norm(self.b)
            if not norm <= 100 * len(self.matrix) * torch.finfo(x.dtype).eps * scale:
                reason = Reason.ACCURACY_LOST
        history = [
            Iteration(0, self._norm(self.b), 0.0, math.nan),
            Iteration(1, norm, model, xAx / xx if xx else math.nan),
        ]
        return Solution(x, reason, 1, norm, norm, model, history, [Iterate(1, x, model)], direction)

    def _multiply(self, x: Tensor, damping: float) -> Tensor:
        Ax = self.matrix @ x if self.rows is None else self.rows.T @ (self.rows @ x)
        return Ax.add_(x, alpha=damping + self.shift)

    def _norm(self, x: Tensor) -> float:
        return math.sqrt(self._space.dots((x, x))[0])
