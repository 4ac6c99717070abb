"""direct: dense symmetric systems by factorisation; one matrix serves every damping that a step tries.

    (G + μI) x = b                                       G given
    (RᵀR + μI) x = Rᵀy + c,  K = RRᵀ:
    x = Rᵀ(K + μI)⁻¹ y + (c - Rᵀ(K + μI)⁻¹ R c)/μ         K given, which never cancels in the part that comes from rows

Where K is ill-conditioned, that leaves a residual far above that of a factorisation of RᵀR + μI; corrections then take it away.

A matrix that is positive definite to working accuracy takes a Cholesky factorisation per damping, at a tenth of the cost of an
eigendecomposition; one that is not takes one eigendecomposition, which then serves all. That a factorisation succeeds proves
little, since pivots of a singular matrix round to either side of zero; so its least eigenvalue is estimated from the factor.
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

_CORRECTIONS = 3
_ROUNDING = 10.0  # units of ε‖A‖; eigenvalues of singular matrices come out within about three of zero


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
        self._factor: tuple[float, Tensor] | None = None
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
            return self._solution(x, reason, damping, direction)
        assert self.right_rows is not None
        y, reason, _ = self._invert(self.right_rows, mu)
        x = self.rows.T @ y
        if self.right.any():
            x = x + self._beside_rows(self.right, mu)
        solution = self._solution(x, reason, damping)
        for _ in range(_CORRECTIONS if reason.converged else 0):
            if solution.reason is Reason.RESIDUAL_TOLERANCE:
                break
            x = solution.x + self._correction(solution.x, damping)
            solution = min(solution, self._solution(x, reason, damping), key=lambda s: s.true_residual_norm)
        return solution

    def _correction(self, x: Tensor, damping: float) -> Tensor:
        """What x lacks, in sample space."""
        assert self.rows is not None
        assert self.right_rows is not None
        mu = damping + self.shift
        if mu > 0:
            return self._beside_rows(self.b - self._multiply(x, damping), mu)
        y, *_ = self._invert(self.right_rows - self.rows @ x, mu)
        return self.rows.T @ y

    def _beside_rows(self, c: Tensor, mu: float) -> Tensor:
        """``(RᵀR + mu I)⁻¹ c``."""
        assert self.rows is not None
        y, *_ = self._invert(self.rows @ c, mu)
        return (c - self.rows.T @ y) / mu

    def _invert(self, b: Tensor, mu: float) -> tuple[Tensor, Reason, Tensor | None]:
        """``(matrix + mu I)⁻¹ b``; LEAST_SQUARES_SOLUTION where directions had to be left out."""
        factor = self._factorise(mu)
        if factor is not None:
            return torch.cholesky_solve(b.unsqueeze(1), factor)[:, 0], Reason.RESIDUAL_TOLERANCE, None
        if self._eigen is None:
            values, vectors = torch.linalg.eigh(self.matrix)
            self._eigen = values, vectors
        values, vectors = self._eigen
        eps = torch.finfo(b.dtype).eps
        rounding = eps * float(values.abs().max())
        if float(values[0]) + mu < -max(len(values), _ROUNDING) * rounding:  # sums over many samples round, too
            return torch.zeros_like(b), Reason.NEGATIVE_CURVATURE, vectors[:, 0].clone()
        kept = values + mu > _ROUNDING * rounding
        x = vectors @ torch.where(kept, (vectors.T @ b) / (values + mu).where(kept, 1.0), 0.0)
        return x, Reason.RESIDUAL_TOLERANCE if kept.all() else Reason.LEAST_SQUARES_SOLUTION, None

    def _factorise(self, mu: float) -> Tensor | None:
        """The Cholesky factor of ``matrix + mu I``, or None where it is not positive definite to working accuracy."""
        if self._eigen is not None:
            return None
        if self._factor is None or self._factor[0] != mu:
            self._factor = None
            shifted = self.matrix.clone()
            shifted.diagonal().add_(mu)
            factor, info = torch.linalg.cholesky_ex(shifted)
            least = math.nan if int(info) else _least_eigenvalue(factor)
            if not least > _ROUNDING * torch.finfo(factor.dtype).eps * float(torch.linalg.matrix_norm(shifted)):
                return None
            self._factor = mu, factor
        return self._factor[1]

    def _solution(self, x: Tensor, reason: Reason, damping: float, direction: Tensor | None = None) -> Solution:
        Ax = self._multiply(x, damping)
        r = self.b - Ax
        xx, xAx, bx, rr = self._space.dots((x, x), (x, Ax), (self.b, x), (r, r))
        norm, model = math.sqrt(rr), 0.5 * xAx - bx
        if reason.converged:
            scale = (self._norm(self.matrix.flatten()) + damping + self.shift) * math.sqrt(xx) + self._norm(self.b)
            if norm <= 10 * len(self.matrix) * torch.finfo(x.dtype).eps * scale:
                reason = Reason.RESIDUAL_TOLERANCE
            elif reason is Reason.RESIDUAL_TOLERANCE:
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


def _least_eigenvalue(factor: Tensor) -> float:
    """An estimate from above, of the matrix with this Cholesky factor; nan or 0 where that is as good as singular."""
    v = torch.randn(len(factor), 1, generator=torch.Generator().manual_seed(0)).to(factor)
    least = math.nan
    for _ in range(3):
        w = torch.cholesky_solve(v / torch.linalg.vector_norm(v), factor)
        least, v = 1.0 / float(torch.linalg.vector_norm(w)), w
    return least
