"""cg: preconditioned conjugate gradients on any symmetric positive definite operator.

What differs from the textbook:
- the curvature pᵀAp is checked at every iteration, against ε‖p‖‖Ap‖, so that scaling A or p changes nothing;
- a stop is proposed with the next product and taken when it is agreed (see AgreeingOperator); that product, A x, gives
  the true residual, so agreement costs nothing where nobody disagrees;
- inner products are accumulated in float64 whatever the vectors' dtype;
- the quadratic model is carried by its recurrence, -½ α rᵀz per iteration, for Martens' stopping rule;
- iterates are kept at geometric spacing for backtracking, O(log k) vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dhf.reason import Reason
from dhf.solvers.linear_operator import AgreeingOperator, Agreement, as_operator, check_system
from dhf.solvers.solution import Iterate, Iteration, Solution

__all__ = ["cg"]

_ACCURACY_SLACK = 2.0


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

    Returns:
        A Solution; its reason says why the solve ended. Never raises on non-convergence. If the recursive residual
        met the tolerance but the true one misses it by more than a factor of 2, the reason is ACCURACY_LOST.

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
    _check_rules(rtol, atol, max_iterations, progress_tolerance, snapshot_ratio)
    check_system(operator, b, x0)
    if preconditioner is not None and not callable(preconditioner):
        raise TypeError(
            f"preconditioner must be a function of r, got {type(preconditioner).__name__}; use lambda r: M @ r"
        )
    A = as_operator(operator)
    b_norm = math.sqrt(A.space.dots((b, b))[0])
    if b_norm == 0:
        return _zero(b)
    limit = 10 * b.numel() if max_iterations is None else max_iterations
    state = _State(A, b, preconditioner or (lambda r: r))
    stop = _StoppingRule(max(rtol * b_norm, atol), limit, progress_tolerance)
    keep = _Snapshots(snapshot_ratio)
    first = None if x0 is None else A.apply(x0)

    def begin() -> Reason | None:
        reason = state.start(x0, first) or stop(state)
        _note(state, callback)
        return reason

    def go_on() -> Reason | None:
        reason = state.advance(product) or stop(state)
        keep(state)
        _note(state, callback)
        return reason

    reason, failure = _own_work(begin)
    true_norm = math.nan
    while True:
        vector = b if failure else state.x_to_return(reason) if reason else state.p
        product, agreed = A.apply(vector, reason, failure)
        if agreed.reason is Reason.NON_FINITE and reason is not Reason.NON_FINITE:
            reason = agreed.reason  # a rank's contribution is broken: no product can be trusted, not even A x
            break
        if not agreed.valid or agreed.reason is not reason:
            reason = agreed.reason
            continue
        if reason is not None:
            r = b - product
            true_norm = math.sqrt(A.space.dots((r, r))[0])
            break
        reason, failure = _own_work(go_on)
    if reason is Reason.RESIDUAL_TOLERANCE and stop.target > 0 and not true_norm <= _ACCURACY_SLACK * stop.target:
        reason = Reason.ACCURACY_LOST
    return state.solution(reason, true_norm, keep)


class _State:
    """The vectors and scalars of the recursion."""

    def __init__(self, A: AgreeingOperator, b: Tensor, precondition: Callable[[Tensor], Tensor]) -> None:
        self.A, self.b, self.precondition = A, b, precondition
        self.history: list[Iteration] = []
        self._epsilon = 10 * torch.finfo(b.dtype).eps
        self._before: tuple[Tensor, Tensor] | None = None  # x and p ahead of a step that may have to be refused

    def start(self, x0: Tensor | None, first: tuple[Tensor, Agreement] | None) -> Reason | None:
        """Set out from x0, of which ``first`` is the product."""
        self.k, self.model = 0, 0.0
        self.x = torch.zeros_like(self.b) if x0 is None else x0.clone()
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
        self.p = z.clone()
        self.residual_norm, self.curvature = math.sqrt(rr), math.nan
        self.history.append(Iteration(0, self.residual_norm, self.model, self.curvature))
        return stopped or self._preconditioner_trouble()

    def advance(self, Ap: Tensor) -> Reason | None:
        """One iteration from the product A p; a Reason if this step must not be taken or the next cannot be."""
        pAp, pp, ApAp = self.A.space.dots((self.p, Ap), (self.p, self.p), (Ap, Ap))
        alpha = self.rho / pAp if pAp else 0.0
        threshold = self._epsilon * math.sqrt(pp * ApAp)
        # in a band around the threshold, since another party may judge a borderline step otherwise
        self._before = None if pAp > 4 * threshold else (self.x.clone(), self.p.clone())
        self.x.add_(self.p, alpha=alpha)
        self.r.sub_(Ap, alpha=alpha)
        z = self.precondition(self.r)
        rr, rho = self.A.space.dots((self.r, self.r), (self.r, z))
        torch.add(z, self.p, alpha=rho / self.rho if self.rho else 0.0, out=self.p)
        self.k += 1
        self.model -= 0.5 * alpha * self.rho
        self.rho = rho
        self.curvature = pAp / pp if pp else math.nan
        self.residual_norm = math.sqrt(rr) if rr >= 0 else math.nan
        self.history.append(Iteration(self.k, self.residual_norm, self.model, self.curvature))
        if not (math.isfinite(pAp) and math.isfinite(rr)):
            return Reason.NON_FINITE
        return Reason.NEGATIVE_CURVATURE if pAp <= threshold else self._preconditioner_trouble()

    def x_to_return(self, reason: Reason) -> Tensor:
        """The iterate that a stop for this reason ends at."""
        return self._before[0] if self._before and self._refused(reason) else self.x

    def solution(self, reason: Reason, true_norm: float, keep: _Snapshots) -> Solution:
        x = self.x_to_return(reason)
        last = self.history[-2] if self._refused(reason) else self.history[-1]
        iterates = keep.upto(last.number, Iterate(last.number, x, last.model))
        direction = self._before[1] if self._before and reason is Reason.NEGATIVE_CURVATURE else None
        return Solution(
            x,
            reason,
            last.number,
            last.residual_norm,
            true_norm,
            last.model,
            self.history,
            iterates,
            direction,
        )

    def _refused(self, reason: Reason) -> bool:
        """Whether the last step was made on a direction that turned out to be unusable."""
        broken = reason is Reason.NON_FINITE and not math.isfinite(self.residual_norm)
        return self._before is not None and (reason is Reason.NEGATIVE_CURVATURE or broken)

    def _preconditioner_trouble(self) -> Reason | None:
        if not math.isfinite(self.rho):
            return Reason.NON_FINITE
        return Reason.INDEFINITE_PRECONDITIONER if self.rho <= 0 and self.residual_norm > 0 else None


class _StoppingRule:
    def __init__(self, target: float, limit: int, progress_tolerance: float | None) -> None:
        self.target, self._limit, self._tolerance = target, limit, progress_tolerance

    def __call__(self, state: _State) -> Reason | None:
        if state.residual_norm <= self.target:
            return Reason.RESIDUAL_TOLERANCE
        if self._tolerance is not None and self._stalls(state.history, self._tolerance):
            return Reason.RELATIVE_PROGRESS
        return Reason.ITERATION_LIMIT if state.k >= self._limit else None

    @staticmethod
    def _stalls(history: list[Iteration], tolerance: float) -> bool:
        k, now = history[-1].number, history[-1].model
        window = max(10, k // 10)
        return k > window and now < 0 and (now - history[k - window].model) / now < window * tolerance


class _Snapshots:
    def __init__(self, ratio: float | None) -> None:
        self._ratio, self._next = ratio, 1.0
        self._kept: list[Iterate] = []

    def __call__(self, state: _State) -> None:
        if self._ratio is not None and state.k >= self._next:
            self._kept.append(Iterate(state.k, state.x.clone(), state.model))
            while self._next <= state.k:
                self._next *= self._ratio

    def upto(self, number: int, last: Iterate) -> list[Iterate]:
        """The kept iterates before ``number``, then the last one; nothing if none were asked for."""
        return [] if self._ratio is None else [*(i for i in self._kept if i.number < number), last]


def _own_work(work: Callable[[], Reason | None]) -> tuple[Reason | None, Exception | None]:
    """Work that takes no product; what fails in it here (a preconditioner, a callback) is told with the next product."""
    try:
        return work(), None
    except Exception as error:
        return None, error


def _note(state: _State, callback: Callable[[Iteration], None] | None) -> None:
    if callback is not None:
        callback(state.history[-1])


def _zero(b: Tensor) -> Solution:
    start = Iteration(0, 0.0, 0.0, math.nan)
    return Solution(torch.zeros_like(b), Reason.ZERO_RIGHT_HAND_SIDE, 0, 0.0, 0.0, 0.0, [start], [])


def _check_rules(
    rtol: float, atol: float, max_iterations: int | None, progress: float | None, ratio: float | None
) -> None:
    if not (0 <= rtol < 1) or not atol >= 0:
        raise ValueError(f"rtol must be in [0, 1) and atol not negative, got rtol={rtol}, atol={atol}")
    if max_iterations is not None and max_iterations < 0:
        raise ValueError(f"max_iterations must not be negative, got {max_iterations}")
    if progress is not None and not progress > 0:
        raise ValueError(f"progress_tolerance must be positive, got {progress}")
    if ratio is not None and not ratio > 1:
        raise ValueError(f"snapshot_ratio must be above 1, got {ratio}")
