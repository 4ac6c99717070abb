"""steihaug: the quadratic model within a trust region, by conjugate gradients cut off at its boundary.

    minimise ½ xᵀA x - bᵀx    over ‖x‖_M ≤ radius,   M⁻¹ the preconditioner, M = I without one

The iterates of conjugate gradients from zero grow in that norm while the model falls. So the solve goes on until one leaves the
region, or a direction has no positive curvature and would leave it for certain, and ends where that direction meets the boundary.

What differs from the textbook: the recurrences of the norms take xᵀr and rᵀp from inner products instead of as they are in exact
arithmetic, so that what they give stays ‖x‖_M however orthogonality is lost:

    ‖p‖²_M = 2 rᵀp - rᵀz + β²‖p'‖²_M        xᵀMp = xᵀr + β (x'ᵀMp' + α'‖p'‖²_M)        ‖x‖²_M = ‖x' + α'p'‖²_M
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dhf.reason import Reason
from dhf.solvers.cg import ConjugateGradients
from dhf.solvers.krylov import StoppingRule, check_preconditioner, guarded, run, zero_solution
from dhf.solvers.linear_operator import Agreement, as_operator, check_system
from dhf.solvers.solution import Iteration, Solution
from dhf.solvers.symmetry import SymmetryCheck

__all__ = ["steihaug"]

_BOUNDARY = (Reason.TRUST_REGION_BOUNDARY, Reason.NEGATIVE_CURVATURE)


def steihaug(
    operator: Any,
    b: Tensor,
    *,
    radius: float,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iterations: int | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    snapshot_ratio: float | None = None,
    callback: Callable[[Iteration], None] | None = None,
) -> Solution:
    """Minimise ``½ xᵀA x - bᵀx`` within a trust region by truncated conjugate gradients, from zero.

    Args:
        operator: A GlobalOperator, a square tensor, or any object with ``matvec`` (shape (n,) to shape (n,)); symmetric.
        b: Right-hand side, minus the gradient of a Newton step; shape (n,), float32 or float64, the operator's dtype and device.
        radius: Of the region, in the units of x (of ``√(bᵀx)`` with a preconditioner); positive.
        rtol: Stop when ``‖b - A x‖ ≤ rtol·‖b‖``. Dimensionless; 0 turns it off.
        atol: Stop when ``‖b - A x‖ ≤ atol``, in the units of b; 0 turns it off.
        max_iterations: Stop after so many iterations; ``10·n`` by default.
        preconditioner: ``r -> z ≈ A⁻¹ r``, symmetric positive definite; its inverse M makes the region's norm, ‖x‖² = xᵀM x.
        snapshot_ratio: Keep iterates at iterations that grow by this factor, in ``Solution.iterates``.
        callback: Called with each Iteration.

    Returns:
        A Solution; its reason says why the solve ended. Never raises on non-convergence. TRUST_REGION_BOUNDARY if x stands on
        the boundary; ``direction`` is then the direction of non-positive curvature that led there, if it was one. The model
        at x is never above that at the Cauchy point, the lowest point within the region along the preconditioned b. A zero b
        gives zero, though an indefinite A has lower points.

    Raises:
        ValueError: If shapes, dtypes or devices differ, or the radius or a tolerance is out of range.
        TypeError: If the operator cannot multiply, or the preconditioner is not a function.
        RankError: If the preconditioner or the callback failed on a rank; alone, what they raised.

    Source: Steihaug (1983); Conn, Gould & Toint, "Trust-Region Methods" (2000), algorithm 7.5.1.

    Example:
        >>> import torch
        >>> A = torch.diag(torch.tensor([2.0, -1.0], dtype=torch.float64))
        >>> solution = steihaug(A, torch.tensor([0.0, 3.0], dtype=torch.float64), radius=0.5)
        >>> solution.x, solution.model, solution.reason.name  # -½ ½² - 3 · ½
        (tensor([0.0000, 0.5000], dtype=torch.float64), -1.625, 'TRUST_REGION_BOUNDARY')
    """
    check_system(operator, b, None)
    check_preconditioner(preconditioner)
    if not (radius > 0 and math.isfinite(radius)):
        raise ValueError(f"radius must be positive and finite, got {radius}")
    A = as_operator(operator)
    b_norm = math.sqrt(A.space.dots((b, b))[0])
    stop = StoppingRule.of(b_norm, A.space.size(b), rtol, atol, max_iterations, dtype=b.dtype)
    if b_norm == 0:
        return zero_solution(b)
    symmetry = SymmetryCheck(b.dtype, preconditioned=preconditioner is not None)
    recursion = _Truncated(ConjugateGradients(A, b, None, guarded(A.space, preconditioner), symmetry), float(radius))
    solution = run(A, recursion, stop, snapshot_ratio=snapshot_ratio, callback=callback)
    # a direction without positive curvature is agreed on under that name, and told under that of where it led
    curved = solution.reason is Reason.NEGATIVE_CURVATURE
    return dataclasses.replace(solution, reason=Reason.TRUST_REGION_BOUNDARY) if curved else solution


@dataclasses.dataclass(frozen=True, slots=True)
class _Exit:
    """Where the last direction leaves the region, in place of the whole step; the direction if its curvature may be none."""

    x: Tensor
    line: Iteration
    direction: Tensor | None


class _Truncated:
    """Conjugate gradients, and how far they are from the boundary."""

    believes = True

    def __init__(self, cg: ConjugateGradients, radius: float) -> None:
        self.cg, self.radius = cg, radius
        # ‖x‖²_M, xᵀMp and ‖p‖²_M at the last product, α and β of its step
        self._xx, self._xp, self._pp, self._alpha, self._beta = 0.0, 0.0, 0.0, 0.0, 0.0
        # the exit is kept wherever another party may judge that the step leaves the region, or that it does not
        self._exit: _Exit | None = None
        self._leaves = self._at_exit = False
        self._whole: Iteration | None = None  # the line of the whole step

    @property
    def x(self) -> Tensor:
        """The iterate."""
        return self._exit.x if self._exit is not None and self._at_exit else self.cg.x

    @property
    def history(self) -> list[Iteration]:
        """Its lines."""
        return self.cg.history

    def start(self, first: tuple[Tensor, Agreement] | None) -> Reason | None:
        """Set out from zero."""
        return self.cg.start(first)

    def ask(self, reason: Reason | None, failure: Exception | None) -> tuple[Tensor, Agreement]:
        """A p, or A x where the solve is to end."""
        self._stand(reason in _BOUNDARY or (reason is not None and self._leaves))
        if self._at_exit and failure is None:
            return self.cg.A.apply(self.x, reason)
        return self.cg.ask(reason, failure)

    def residual(self, product: Tensor) -> Tensor:
        """``b - A x``."""
        return self.cg.residual(product)

    def advance(self, Ap: Tensor) -> Reason | None:
        """One iteration from the product A p; a Reason if it leaves the region or the next cannot be."""
        cg, p = self.cg, self.cg.p
        pAp, pp, ApAp, rp, xr, rAp = cg.A.space.dots((p, Ap), (p, p), (Ap, Ap), (cg.r, p), (cg.x, cg.r), (cg.r, Ap))
        tau, rho = self._to_boundary(rp, xr), cg.rho
        self._leaves = pAp * tau <= rho  # τ ≤ ρ / pᵀAp, or pᵀAp ≤ 0
        flat = cg.least_curvature(pp, ApAp)
        self._exit, self._at_exit = None, False
        if pAp * tau <= 1.01 * rho:
            rr = cg.residual_norm**2 - 2 * tau * rAp + tau**2 * ApAp
            model = cg.model - tau * rp + 0.5 * tau**2 * pAp
            line = Iteration(cg.k + 1, math.sqrt(max(rr, 0.0)), model, pAp / pp if pp else math.nan)
            x = torch.add(cg.x, p, alpha=min(tau, torch.finfo(p.dtype).max))
            self._exit = _Exit(x, line, p.clone() if pAp <= 4 * flat else None)
        reason = cg.checked_step(Ap, pAp, pp, ApAp, 0.0)
        self._alpha, self._beta = rho / pAp if pAp else 0.0, cg.rho / rho if rho else 0.0
        self._whole = cg.history[-1]
        self._stand(self._leaves)
        if self._leaves and reason is not Reason.NOT_SYMMETRIC:
            return Reason.NEGATIVE_CURVATURE if pAp <= flat else Reason.TRUST_REGION_BOUNDARY
        return reason

    def end(self, reason: Reason) -> tuple[Tensor, Iteration, Tensor | None]:
        """Where the solve stands, and the direction of non-positive curvature that led there."""
        if self._exit is None or not self._at_exit:
            return self.cg.end(reason)
        return self._exit.x, self._exit.line, self._exit.direction if reason is Reason.NEGATIVE_CURVATURE else None

    def _to_boundary(self, rp: float, xr: float) -> float:
        """The τ > 0 at which ``‖x + τ p‖_M = radius``, having carried the norms to this x and p."""
        crossed = self._xp + self._alpha * self._pp
        self._xx += self._alpha * (self._xp + crossed)
        self._xp = xr + self._beta * crossed
        self._pp = 2 * rp - self.cg.rho + self._beta**2 * self._pp
        gap = max(self.radius**2 - self._xx, 0.0)
        root = math.sqrt(max(self._xp**2 + self._pp * gap, 0.0))
        if self._xp > 0:
            return gap / (self._xp + root)
        return (root - self._xp) / self._pp if self._pp else 0.0

    def _stand(self, at_exit: bool) -> None:
        """Take the exit, or the whole step after all."""
        if self._exit is not None and self._whole is not None:
            self._at_exit = at_exit
            self.history[-1] = self._exit.line if at_exit else self._whole
