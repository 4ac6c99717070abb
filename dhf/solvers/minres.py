"""minres: minimal residuals on any symmetric operator, be it indefinite or singular.

    A V_k = R_{k+1} T_k,   V = M⁻¹R,   RᵀV = I      Lanczos' vectors; M⁻¹ is the preconditioner, M = I without one
    x_k minimises ‖b - A x‖ in the norm of M⁻¹ over x_0 + span V_k, by Givens rotations of the tridiagonal T_k
    r_k = s_k² r_{k-1} - c_k φ̄_k R_{k+1}e_{k+1}     the residual itself, at one vector more
    ‖A r_{k-1}‖ = φ̄_{k-1} ‖(γ̄_k, δ̄_{k+1})‖          known from T_k before x_k is formed

A system that is singular to working precision and has no exact solution shows in two steps. ‖A r‖ / (‖A‖‖r‖) falls to 4√ε: least
squares are reached, for a smaller ‖A r‖ would lower ‖r‖ by no more than ε of itself. Such an iterate x_c is kept, since an
ill-conditioned system may look the same. If the residual halves after all, it is forgotten; if instead x grows along a null
vector,

    ‖r_c‖ + ‖r_k‖ ≤ 20 ε ‖A‖ (‖x_k‖ - ‖x_c‖)    so that d = x_k - x_c has ‖A d‖ ≤ 20 ε ‖A‖‖d‖,

then A is singular to working precision, and x_c is the solution.

What differs from the textbook:
- that, where it trusts ‖A r‖ alone;
- the residual is carried in the plain norm, in which a solve is to end whatever the preconditioner;
- every stop is agreed, inner products are accumulated in float64, and symmetry is checked, as in cg.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dhf.reason import Reason
from dhf.solvers.krylov import StoppingRule, check_preconditioner, guarded, run, zero_solution
from dhf.solvers.linear_operator import AgreeingOperator, Agreement, as_operator, check_system
from dhf.solvers.solution import Iteration, Solution
from dhf.solvers.symmetry import SymmetryCheck

__all__ = ["minres"]


def minres(
    operator: Any,
    b: Tensor,
    *,
    x0: Tensor | None = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iterations: int | None = None,
    preconditioner: Callable[[Tensor], Tensor] | None = None,
    snapshot_ratio: float | None = None,
    callback: Callable[[Iteration], None] | None = None,
) -> Solution:
    """Solve ``A x = b`` for a symmetric operator, definite or not, by minimal residuals.

    On an ill-conditioned system cg reaches a smaller residual, where A is positive definite; minres loses about ``ε κ²`` of ‖b‖.
    It then ends with ACCURACY_LOST, and a second solve from ``x0=solution.x`` goes on from there.

    Args:
        operator: A GlobalOperator, a square tensor, or any object with ``matvec`` (shape (n,) to shape (n,)).
        b: Right-hand side, shape (n,), float32 or float64, the operator's dtype and device.
        x0: Start, shape (n,); zero by default.
        rtol: Stop when ``‖b - A x‖ ≤ rtol·‖b‖``, in the plain norm. Dimensionless; 0 turns it off.
        atol: Stop when ``‖b - A x‖ ≤ atol``, in the units of b; 0 turns it off.
        max_iterations: Stop after so many iterations; ``10·n`` by default.
        preconditioner: ``r -> z ≈ |A|⁻¹ r``, symmetric positive definite even where A is not; none by default.
        snapshot_ratio: Keep iterates at iterations that grow by this factor, in ``Solution.iterates``.
        callback: Called with each Iteration; its ``curvature`` is the Rayleigh quotient of the iteration's Lanczos vector.

    Returns:
        A Solution; its reason says why the solve ended. Never raises on non-convergence. LEAST_SQUARES_SOLUTION if the system
        is singular to working precision and has no exact solution; x then minimises ‖b - A x‖ (not ‖x‖ as well).
        NOT_SYMMETRIC as in :func:`dhf.cg`. Without a preconditioner the residual norm never grows.

    Raises:
        ValueError: If shapes, dtypes or devices differ, or a tolerance is out of range.
        TypeError: If the operator cannot multiply, or the preconditioner is not a function.
        RankError: If the preconditioner or the callback failed on a rank; alone, what they raised.

    Source: Paige & Saunders (1975); singular systems: Choi, Paige & Saunders (2011).

    Example:
        >>> import torch
        >>> A = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)  # eigenvalues 3 and -1
        >>> solution = minres(A, torch.tensor([5.0, 4.0], dtype=torch.float64))
        >>> solution.x.round(decimals=12), solution.iterations, solution.reason.name
        (tensor([1., 2.], dtype=torch.float64), 2, 'RESIDUAL_TOLERANCE')
    """
    check_system(operator, b, x0)
    check_preconditioner(preconditioner)
    A = as_operator(operator)
    b_norm = math.sqrt(A.space.dots((b, b))[0])
    stop = StoppingRule.of(b_norm, A.space.size(b), rtol, atol, max_iterations, dtype=b.dtype)
    if b_norm == 0:
        return zero_solution(b)
    symmetry = SymmetryCheck(b.dtype, preconditioned=preconditioner is not None)
    recursion = _MinimalResiduals(A, b, x0, guarded(A.space, preconditioner), symmetry)
    return run(A, recursion, stop, x0=x0, snapshot_ratio=snapshot_ratio, callback=callback)


@dataclasses.dataclass(frozen=True, slots=True)
class _Rotation:
    """The Givens rotation (c, s) that ends a column of T, and what the rotations so far leave of it and of the next two.

    Attributes:
        gamma, delta, epsilon: The column of R in T = QR, from the diagonal upwards.
        delta_bar, next_epsilon: What this and the next rotation find of the columns to come.
        Ar: ‖A r‖ / ‖r‖ of the residual ahead of this rotation, in the norm of M⁻¹.
    """

    c: float = -1.0
    s: float = 0.0
    gamma: float = 0.0
    delta: float = 0.0
    epsilon: float = 0.0
    delta_bar: float = 0.0
    next_epsilon: float = 0.0
    Ar: float = 0.0

    def then(self, alpha: float, beta: float) -> _Rotation:
        """The rotation that ends the next column of T, whose diagonal is alpha and whose lower neighbour beta."""
        gamma_bar = self.s * self.delta_bar - self.c * alpha
        delta_bar = -self.c * beta
        gamma = math.hypot(gamma_bar, beta)
        return _Rotation(
            c=gamma_bar / gamma if gamma else -1.0,
            s=beta / gamma if gamma else 0.0,
            gamma=gamma,
            delta=self.c * self.delta_bar + self.s * alpha,
            epsilon=self.next_epsilon,
            delta_bar=delta_bar,
            next_epsilon=self.s * beta,
            Ar=math.hypot(gamma_bar, delta_bar),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Kept:
    """An iterate that may be the least-squares solution of a singular system."""

    x: Tensor
    line: Iteration
    x_norm: float
    Ar: float


class _MinimalResiduals:
    """Two Lanczos vectors, two directions, the residual, and the last rotation."""

    believes = True

    def __init__(
        self,
        A: AgreeingOperator,
        b: Tensor,
        x0: Tensor | None,
        precondition: Callable[[Tensor], Tensor],
        symmetry: SymmetryCheck,
    ) -> None:
        self.A, self.b, self.precondition, self._symmetry = A, b, precondition, symmetry
        self.x = torch.zeros_like(b) if x0 is None else x0.clone()
        self.history: list[Iteration] = []
        self._rotation, self._epsilon = _Rotation(), torch.finfo(b.dtype).eps
        # ‖A‖ at least, in the norm of M⁻¹ and in the plain one
        self.T_norm = self.A_norm = 0.0
        self._last_v: Tensor | None = None  # kept while products are to be checked
        self._before: Tensor | None = None  # x ahead of a step that may have to be refused
        self._kept: _Kept | None = None

    def start(self, first: tuple[Tensor, Agreement] | None) -> Reason | None:
        """Set out from x, of which ``first`` is the product."""
        self.r = self.b.clone()
        stopped = None if first is None else first[1].reason
        if stopped is not None:
            self.x.zero_()
        elif first is not None:
            self.r.sub_(first[0])
        self.u, self.last_u = self.r.clone(), torch.zeros_like(self.r)  # Lanczos vectors β R e, not normalised
        self.w, self.last_w = torch.zeros_like(self.r), torch.zeros_like(self.r)
        self.beta = 1.0
        trouble = self._next_vector()
        self.phi_bar = self.beta
        self._note(math.nan)
        if trouble is None and self.beta == 0 and self.history[0].residual_norm > 0:
            trouble = Reason.INDEFINITE_PRECONDITIONER
        return stopped or trouble

    def ask(self, reason: Reason | None, failure: Exception | None) -> tuple[Tensor, Agreement]:
        """A v, or A x where the solve is to end."""
        return self.A.apply(self.b if failure else self._standing(reason)[0] if reason else self.v, reason, failure)

    def residual(self, product: Tensor) -> Tensor:
        """``b - A x``."""
        return self.b - product

    def advance(self, Av: Tensor) -> Reason | None:
        """One iteration from the product A v; a Reason if this step must not be taken or the next cannot be."""
        v, beta, started = self.v, self.beta, len(self.history) > 1
        violated = self._contradicts(Av) if self._symmetry.wanted else False
        # the next column of T; the next Lanczos vector takes the place of the last but one
        u = self.last_u.mul_(-beta / self.last_beta).add_(Av)
        alpha, vv, AvAv = self.A.space.dots((v, u), (v, v), (Av, Av))
        u.sub_(self.u, alpha=alpha * _inverse(beta))
        self.last_u, self.u = self.u, u
        trouble = self._next_vector()
        self._remember(v, vv, Av)
        self.T_norm = max(self.T_norm, math.hypot(beta if started else 0.0, alpha, self.beta))
        self.A_norm = max(self.A_norm, math.sqrt(AvAv * _inverse(vv)))

        turn = self._rotation = self._rotation.then(alpha, self.beta)
        self._keep(turn.Ar)
        w = self.last_w.mul_(-turn.epsilon).add_(self.w, alpha=-turn.delta).add_(v).mul_(_inverse(turn.gamma))
        self.last_w, self.w = self.w, w
        # wherever β² is not surely positive, since another party may judge it otherwise
        self._before = None if self.beta > 0 else self.x.clone()
        self.x.add_(w, alpha=turn.c * self.phi_bar)
        self.phi_bar *= turn.s
        self.r.mul_(turn.s**2).sub_(u, alpha=turn.c * self.phi_bar * _inverse(self.beta))
        self._note(alpha / vv if vv else math.nan)
        if not math.isfinite(self.history[-1].residual_norm):
            return Reason.NON_FINITE
        if self._singular():
            return Reason.LEAST_SQUARES_SOLUTION
        return trouble or (Reason.NOT_SYMMETRIC if violated else None)

    def end(self, reason: Reason) -> tuple[Tensor, Iteration, Tensor | None]:
        """Where the solve stands; it tells of no direction."""
        return *self._standing(reason), None

    def _keep(self, Ar: float) -> None:
        """Keep x, as yet without its next step, or forget what was kept, given the ``‖A r‖ / ‖r‖`` of x."""
        # in a band around the threshold, since another party may judge a borderline iterate otherwise
        kept, band = self._kept, 4 * self._near
        if kept is not None:  # the start is kept until the second product tells how long A is
            halved = self.history[-1].residual_norm < 0.5 * kept.line.residual_norm
            kept = None if halved or kept.Ar > band else kept
        if kept is None:
            keep = Ar <= band or len(self.history) == 1
        else:  # a smaller ‖A r‖ is better unless x has set out along the null space
            keep = Ar < 0.5 * kept.Ar and (kept.Ar > self._near or not self._drifts(kept, math.sqrt(self._epsilon)))
        self._kept = _Kept(self.x.clone(), self.history[-1], self.x_norm, Ar) if keep else kept

    def _singular(self) -> bool:
        """Whether what was kept is a least-squares solution, and there is no better."""
        if self._kept is None or self._kept.Ar <= self._tiny:
            return self._kept is not None
        return self._kept.Ar <= self._near and self._drifts(self._kept, 20 * self._epsilon)

    def _drifts(self, kept: _Kept, rounding: float) -> bool:
        """Whether what x has moved since is a null vector of A, but for so much of ‖A‖."""
        change = kept.line.residual_norm + self.history[-1].residual_norm
        return change <= rounding * self.A_norm * (self.x_norm - kept.x_norm)

    @property
    def _near(self) -> float:
        """The ‖A r‖ / ‖r‖ of an iterate that may be a least-squares solution."""
        return 4 * math.sqrt(self._epsilon) * self.T_norm

    @property
    def _tiny(self) -> float:
        """The ‖A r‖ / ‖r‖ of one that is."""
        return 20 * self._epsilon * self.T_norm

    def _next_vector(self) -> Reason | None:
        """v and β from the newest Lanczos vector; what is wrong with them."""
        z = self.precondition(self.u)
        uz, uu, zz = self.A.space.dots((self.u, z), (self.u, self.u), (z, z))
        self.last_beta, self.beta = self.beta or 1.0, 0.0 if uz < 0 else math.sqrt(uz)
        self.v = z / self.beta if self.beta else torch.zeros_like(z)
        if not math.isfinite(uz):
            return Reason.NON_FINITE
        # near the end u is rounding, and so may be the sign of a tiny uᵀz
        indefinite = uz < -100 * self._epsilon * math.sqrt(uu * zz)
        return Reason.INDEFINITE_PRECONDITIONER if indefinite else None

    def _contradicts(self, Av: Tensor) -> bool:
        """Whether A v does not go with the product before."""
        last = self.v if self._last_v is None else self._last_v
        vv, AvAv, across = self.A.space.dots((self.v, self.v), (Av, Av), (last, Av))
        return self._symmetry.violated(0.0 if self._last_v is None else across, math.sqrt(vv), math.sqrt(AvAv))

    def _remember(self, v: Tensor, vv: float, Av: Tensor) -> None:
        """Keep what the next product is compared with."""
        self._last_v = v if self._symmetry.wanted else None
        if self._last_v is not None:
            self._symmetry.expect(self.A.space.dots((self.v, Av))[0], math.sqrt(vv))

    def _note(self, curvature: float) -> None:
        rr, xr, bx, xx = self.A.space.dots((self.r, self.r), (self.x, self.r), (self.b, self.x), (self.x, self.x))
        self.x_norm = math.sqrt(xx)
        self.history.append(Iteration(len(self.history), math.sqrt(rr), 0.0 - 0.5 * (xr + bx), curvature))

    def _standing(self, reason: Reason) -> tuple[Tensor, Iteration]:
        """The iterate at which a solve that ends for this reason stands."""
        if self._kept is not None and reason is Reason.LEAST_SQUARES_SOLUTION:
            return self._kept.x, self._kept.line
        broken = reason is Reason.NON_FINITE and not math.isfinite(self.history[-1].residual_norm)
        if self._before is not None and (broken or reason is Reason.INDEFINITE_PRECONDITIONER):
            return self._before, self.history[-2]
        return self.x, self.history[-1]


def _inverse(x: float) -> float:
    return 1 / x if x else 0.0
