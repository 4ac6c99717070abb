"""cg: preconditioned conjugate gradients on any symmetric positive definite operator.

What differs from the textbook:
- the curvature pᵀAp is checked at every iteration, against ε‖p‖‖Ap‖, so that scaling A or p changes nothing;
- every stop is agreed, and ends with the true residual (see krylov.py);
- inner products are accumulated in float64 whatever the vectors' dtype;
- the quadratic model is carried by its recurrence, -½ α rᵀz per iteration, for Martens' stopping rule;
- iterates are kept at geometric spacing for backtracking, O(log k) vectors;
- where products are rounded on their way (see Compressed), the residual is taken anew from an exact one each time it has fallen
  tenfold, and before it is believed to have reached its target;
- an operator that is grossly not symmetric is found out by its first products (see symmetry.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dhf.reason import Reason
from dhf.replay import aside
from dhf.solvers.krylov import Recursion, StoppingRule, check_preconditioner, guarded, run, zero_solution
from dhf.solvers.linear_operator import AgreeingOperator, Agreement, as_operator, check_system
from dhf.solvers.solution import Iteration, Solution
from dhf.solvers.symmetry import SymmetryCheck

__all__ = ["ConjugateGradients", "Replacing", "cg"]


def cg(
    operator: Any,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iterations: int | None = None,
    progress_tolerance: float | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    snapshot_ratio: float | None = None,
    callback: Callable[[Iteration], None] | None = None,
    true_residual: bool = True,
) -> Solution:
    """Solve ``A x = b`` for a symmetric positive definite operator by preconditioned conjugate gradients.

    Args:
        operator: A GlobalOperator, a square tensor, or any object with ``matvec`` (shape (n,) to shape (n,)).
        b: Right-hand side, shape (n,), float32 or float64, the operator's dtype and device.
        x0: Start, shape (n,); zero by default.
        rtol: Stop when ``‖b - A x‖ ≤ rtol·‖b‖``. Dimensionless; 0 turns it off.
        atol: Stop when ``‖b - A x‖ ≤ atol``, in the units of b; 0 turns it off.
        max_iterations: Stop after so many iterations; ``10·n`` by default.
        progress_tolerance: Martens' rule: stop at iteration k when the model ``φ = ½xᵀAx - bᵀx`` is negative and has gained
            less than ``w·progress_tolerance`` of itself over the last ``w = max(10, k/10)`` iterations. 5e-4 is his choice.
        preconditioner: ``r -> z ≈ A⁻¹ r``, symmetric positive definite; none by default.
        snapshot_ratio: Keep iterates at iterations that grow by this factor (1.3 is Martens'), in ``Solution.iterates``.
        callback: Called with each Iteration.
        true_residual: Whether to take the product that tells the true residual at the end. A solve that stops at a loose
            tolerance, where the recursion cannot have parted from it, may leave it out.

    Returns:
        A Solution; its reason says why the solve ended. Never raises on non-convergence. If the recursive residual
        met the tolerance but the true one misses it by more than a factor of 2, the reason is ACCURACY_LOST.
        If the first products show a gross asymmetry, it is NOT_SYMMETRIC (float32 without a preconditioner, or float64).

    Raises:
        ValueError: If shapes, dtypes or devices differ, or a tolerance is out of range.
        TypeError: If the operator cannot multiply, or the preconditioner is not a function.
        RankError: If the preconditioner or the callback failed on a rank; alone, what they raised.

    Source: Hestenes & Stiefel (1952); stopping and backtracking iterates: Martens (2010), sections 4.4 and 4.6.

    Example:
        >>> import torch
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
        >>> solution = cg(A, torch.tensor([3.0, 4.0], dtype=torch.float64))
        >>> solution.x.round(decimals=12), solution.iterations, solution.reason.name
        (tensor([1., 1.], dtype=torch.float64), 2, 'RESIDUAL_TOLERANCE')
    """
    check_system(operator, b, x0)
    check_preconditioner(preconditioner)
    A = as_operator(operator)
    b_norm = math.sqrt(A.space.dots((b, b))[0])
    stop = StoppingRule.of(b_norm, A.space.size(b), rtol, atol, max_iterations, progress_tolerance, b.dtype)
    if b_norm == 0:
        return zero_solution(b)
    symmetry = SymmetryCheck(b.dtype, preconditioned=preconditioner is not None)
    plain = _recursion(A, b, x0, preconditioner, symmetry, stop.limit)
    recursion: Recursion = plain
    ratio = getattr(A, "residual_replacement", None)
    if ratio is not None and true_residual:
        recursion = _Corrected(plain, ratio, stop.target)
    with aside(b.device):
        return run(
            A,
            recursion,
            stop,
            x0=x0,
            snapshot_ratio=snapshot_ratio,
            callback=callback,
            true_residual=true_residual,
        )


def _recursion(
    A: AgreeingOperator,
    b: Tensor,
    x0: Tensor | None,
    preconditioner: Callable[[Tensor], Tensor] | None,
    symmetry: SymmetryCheck,
    limit: int,
) -> ConjugateGradients:
    if getattr(A, "queues", False):
        from dhf.solvers.queued import QueuedConjugateGradients  # it rests on this module

        return QueuedConjugateGradients(A, b, x0, preconditioner, symmetry, limit)  # type: ignore[arg-type]
    return ConjugateGradients(A, b, x0, guarded(A.space, preconditioner), symmetry)


class ConjugateGradients:
    """The vectors and scalars of the recursion."""

    believes = True

    def __init__(
        self,
        A: AgreeingOperator,
        b: Tensor,
        x0: Tensor | None,
        precondition: Callable[[Tensor], Tensor],
        symmetry: SymmetryCheck | None = None,
    ) -> None:
        self.A, self.b, self.precondition = A, b, precondition
        self._symmetry = symmetry
        self.x = torch.zeros_like(b) if x0 is None else x0.clone()
        self.history: list[Iteration] = []
        self.k, self.model = 0, 0.0
        self._epsilon = 10 * torch.finfo(b.dtype).eps
        self._z: Tensor | None = None
        self._before: tuple[Tensor, Tensor] | None = None  # x and p ahead of a step that may have to be refused

    def start(self, first: tuple[Tensor, Agreement] | None) -> Reason | None:
        """Set out from x, of which ``first`` is the product."""
        self.r = self.b.clone()
        stopped = None if first is None else first[1].reason
        if first is not None:
            if stopped is not None:
                self.x.zero_()
            else:
                self.r.sub_(first[0])
                self.model = -0.5 * sum(self.A.space.dots((self.r, self.x), (self.b, self.x)))
        z = self.precondition(self.r)
        rr, self.rho = self.A.space.dots((self.r, self.r), (self.r, z))
        self.p, self._z = z.clone(), z  # z of the coming product is kept while that is to be checked
        self.residual_norm, self.curvature = math.sqrt(rr), math.nan
        self.history.append(Iteration(0, self.residual_norm, self.model, self.curvature))
        return stopped or self._preconditioner_trouble()

    def ask(self, reason: Reason | None, failure: Exception | None) -> tuple[Tensor, Agreement]:
        """A p, or A x where the solve is to end."""
        return self.A.apply(self.b if failure else self._standing(reason) if reason else self.p, reason, failure)

    def residual(self, product: Tensor) -> Tensor:
        """``b - A x``."""
        return self.b - product

    def advance(self, Ap: Tensor) -> Reason | None:
        """One iteration from the product A p; a Reason if this step must not be taken or the next cannot be."""
        pAp, pp, ApAp = self.A.space.dots((self.p, Ap), (self.p, self.p), (Ap, Ap))
        return self.checked_step(Ap, pAp, pp, ApAp, self.least_curvature(pp, ApAp))

    def checked_step(self, Ap: Tensor, pAp: float, pp: float, ApAp: float, threshold: float) -> Reason | None:
        """As :meth:`step`; the first few find out whether A is symmetric."""
        if self._symmetry is None or self._z is None:
            return self.step(Ap, pAp, pp, threshold)
        # u = βp', p' the direction before: p = z + u, so that uᵀAp = pᵀAp - zᵀAp
        (zAp,) = self.A.space.dots((self._z, Ap))
        violated = self._symmetry.violated(pAp - zAp, math.sqrt(pp), math.sqrt(ApAp))
        rho = self.rho
        reason = self.step(Ap, pAp, pp, threshold)
        if self._z is not None:
            beta = self.rho / rho if rho else 0.0
            (zAp,) = self.A.space.dots((self._z, Ap))
            self._symmetry.expect(beta * (zAp + beta * pAp), beta * math.sqrt(pp))
        return reason or (Reason.NOT_SYMMETRIC if violated else None)

    def least_curvature(self, pp: float, ApAp: float) -> float:
        """The least pᵀAp that counts as positive, ``10 ε ‖p‖ ‖A p‖``."""
        return self._epsilon * math.sqrt(pp * ApAp)

    def step(self, Ap: Tensor, pAp: float, pp: float, threshold: float) -> Reason | None:
        """The iteration, given the curvature along p and the least that counts as positive."""
        alpha = self.rho / pAp if pAp else 0.0
        # in a band around the threshold, since another party may judge a borderline step otherwise
        self._before = None if pAp > 4 * threshold else (self.x.clone(), self.p.clone())
        self.x.add_(self.p, alpha=alpha)
        self.r.sub_(Ap, alpha=alpha)
        z = self.precondition(self.r)
        self._z = z if self._symmetry is not None and self._symmetry.wanted else None
        rr, rho = self.A.space.dots((self.r, self.r), (self.r, z))
        torch.add(z, self.p, alpha=rho / self.rho if self.rho else 0.0, out=self.p)
        return self.account(pAp, pp, rr, rho, threshold)

    def account(self, pAp: float, pp: float, rr: float, rho: float, threshold: float) -> Reason | None:
        """Take note of an iteration by its numbers."""
        self.k += 1
        self.model -= 0.5 * (self.rho / pAp if pAp else 0.0) * self.rho
        self.rho = rho
        self.curvature = pAp / pp if pp else math.nan
        self.residual_norm = math.sqrt(rr) if rr >= 0 else math.nan
        self.history.append(Iteration(self.k, self.residual_norm, self.model, self.curvature))
        if not (math.isfinite(pAp) and math.isfinite(rr)):
            return Reason.NON_FINITE
        return Reason.NEGATIVE_CURVATURE if pAp <= threshold else self._preconditioner_trouble()

    def replace_residual(self, r: Tensor) -> Reason | None:
        """Go on with this residual in place of the recurrence's."""
        z = self.precondition(r)
        old = self.precondition(self.r)
        self.p.add_(z - old)  # p = z + βp with the same β
        self.r.copy_(r)
        rr, self.rho = self.A.space.dots((r, r), (r, z))
        self.residual_norm = math.sqrt(rr)
        return self._preconditioner_trouble()

    def end(self, reason: Reason) -> tuple[Tensor, Iteration, Tensor | None]:
        """Where the solve stands, and the direction of non-positive curvature that ended it."""
        direction = self._before[1] if self._before and reason is Reason.NEGATIVE_CURVATURE else None
        return self._standing(reason), self.history[-2] if self._refused(reason) else self.history[-1], direction

    def _standing(self, reason: Reason) -> Tensor:
        return self._before[0] if self._before and self._refused(reason) else self.x

    def _refused(self, reason: Reason) -> bool:
        """Whether the last step was made on a direction that turned out to be unusable."""
        broken = reason is Reason.NON_FINITE and not math.isfinite(self.residual_norm)
        return self._before is not None and (reason is Reason.NEGATIVE_CURVATURE or broken)

    def _preconditioner_trouble(self) -> Reason | None:
        if not math.isfinite(self.rho):
            return Reason.NON_FINITE
        return Reason.INDEFINITE_PRECONDITIONER if self.rho <= 0 and self.residual_norm > 0 else None


class Replacing:
    """Conjugate gradients whose residual is taken anew from time to time; what such recursions share."""

    believes = True

    def __init__(self, cg: ConjugateGradients) -> None:
        self.cg = cg
        self._replaced, self._replacing = (
            math.inf,
            False,
        )  # the residual norm when it was taken anew, and whether it is now

    @property
    def x(self) -> Tensor:
        """The iterate."""
        return self.cg.x

    @property
    def history(self) -> list[Iteration]:
        """Its lines."""
        return self.cg.history

    def start(self, first: tuple[Tensor, Agreement] | None) -> Reason | None:
        """Set out."""
        reason = self.cg.start(first)
        self._replaced = self.cg.residual_norm
        return reason

    def end(self, reason: Reason) -> tuple[Tensor, Iteration, Tensor | None]:
        """Where the solve stands."""
        return self.cg.end(reason)


class _Corrected(Replacing):
    """Conjugate gradients whose residual is replaced by a true one before rounded products can have led it astray."""

    # the residual that meets the target must be a true one
    believes = False

    def __init__(self, cg: ConjugateGradients, ratio: float, target: float) -> None:
        super().__init__(cg)
        self._ratio, self._target = ratio, target

    def ask(self, reason: Reason | None, failure: Exception | None) -> tuple[Tensor, Agreement]:
        """A p, or A x where the solve is to end or the residual to be replaced."""
        self._replacing = reason is Reason.RESIDUAL_REPLACED
        return self.cg.ask(reason, failure)

    def advance(self, product: Tensor) -> Reason | None:
        """One iteration, or a new residual."""
        if self._replacing:
            trouble = self.cg.replace_residual(self.cg.residual(product))
            self._replaced = self.cg.residual_norm
            return trouble or (Reason.RESIDUAL_TOLERANCE if self._replaced <= self._target else None)
        reason = self.cg.advance(product)
        due = self.cg.residual_norm < max(self._ratio * self._replaced, self._target)
        return Reason.RESIDUAL_REPLACED if reason is None and due else reason

    def residual(self, product: Tensor) -> Tensor:
        """``b - A x``."""
        return self.cg.residual(product)
