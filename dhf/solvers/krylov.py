"""krylov: what the iterative solvers share: the loop in which every stop is agreed, their stopping rules, the iterates they keep.

A stop is proposed with the next product and taken when it is agreed (see AgreeingOperator); that product, of the solution
itself, gives the true residual, so agreement costs nothing where nobody disagrees. A solver writes a Recursion: what to
multiply next, and what to do with the product.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from dhf.errors import CommunicationError, RankError
from dhf.reason import Reason
from dhf.solvers.linear_operator import AgreeingOperator, Agreement
from dhf.solvers.solution import Iterate, Iteration, Solution
from dhf.vector_space import VectorSpace

__all__ = ["Recursion", "StoppingRule", "check_preconditioner", "guarded", "own_work", "run", "zero_solution"]

T = TypeVar("T")

_ACCURACY_SLACK = 2.0


class Recursion(Protocol):
    """One solver's vectors and scalars.

    Attributes:
        believes: Whether a residual of the recursion may end the solve without being taken anew first.
    """

    believes: bool

    @property
    def x(self) -> Tensor:
        """The iterate, shape (n,)."""

    @property
    def history(self) -> list[Iteration]:
        """One Iteration per iteration done, and one for the start."""

    def start(self, first: tuple[Tensor, Agreement] | None) -> Reason | None:
        """Set out; ``first`` is the answer to the product of a start that is not zero. A Reason if there is no going on."""

    def ask(self, reason: Reason | None, failure: Exception | None) -> tuple[Tensor, Agreement]:
        """The next product: for an iteration, or, with a reason to end, of the solution."""

    def advance(self, product: Tensor) -> Reason | None:
        """One iteration from its product; a Reason if this step must not be taken or the next cannot be."""

    def residual(self, product: Tensor) -> Tensor:
        """The true residual from the product of the solution."""

    def end(self, reason: Reason) -> tuple[Tensor, Iteration, Tensor | None]:
        """The iterate at which a solve that ends for this reason stands, its line, and a direction to tell of."""


@dataclasses.dataclass(frozen=True, slots=True)
class StoppingRule:
    """When a solve ends.

    Args:
        target: Residual norm to reach; 0 turns it off.
        limit: Most iterations.
        progress_tolerance: Martens' rule (see :func:`dhf.cg`), or None.
    """

    target: float
    limit: int
    progress_tolerance: float | None = None

    @staticmethod
    def of(
        b_norm: float,
        n: int,
        rtol: float,
        atol: float,
        max_iterations: int | None,
        progress_tolerance: float | None = None,
        dtype: torch.dtype | None = None,
    ) -> StoppingRule:
        """The rule in the terms of a caller, who is called by the one whom a warning is to name; ``dtype`` is that of b.

        Warns:
            UserWarning: If rtol is below what the dtype can reach.

        Raises:
            ValueError: If a tolerance or limit is out of range.
        """
        if not (0 <= rtol < 1) or not atol >= 0:
            raise ValueError(f"rtol must be in [0, 1) and atol not negative, got rtol={rtol}, atol={atol}")
        if max_iterations is not None and max_iterations < 0:
            raise ValueError(f"max_iterations must not be negative, got {max_iterations}")
        if progress_tolerance is not None and not progress_tolerance > 0:
            raise ValueError(f"progress_tolerance must be positive, got {progress_tolerance}")
        if dtype is not None and 0 < rtol < torch.finfo(dtype).eps:
            warnings.warn(
                f"rtol={rtol:g} is below what {str(dtype).removeprefix('torch.')} can reach (about "
                f"{torch.finfo(dtype).eps:.0e} times the condition number); use "
                f"{'float64 or ' if dtype == torch.float32 else ''}a larger rtol",
                stacklevel=3,
            )
        return StoppingRule(
            max(rtol * b_norm, atol), 10 * n if max_iterations is None else max_iterations, progress_tolerance
        )

    def __call__(self, history: list[Iteration]) -> Reason | None:
        if history[-1].residual_norm <= self.target:
            return Reason.RESIDUAL_TOLERANCE
        if self.progress_tolerance is not None and self._stalls(history, self.progress_tolerance):
            return Reason.RELATIVE_PROGRESS
        return Reason.ITERATION_LIMIT if history[-1].number >= self.limit else None

    @staticmethod
    def _stalls(history: list[Iteration], tolerance: float) -> bool:
        k, now = history[-1].number, history[-1].model
        window = max(10, k // 10)
        return k > window and now < 0 and (now - history[k - window].model) / now < window * tolerance


def run(
    A: AgreeingOperator,
    recursion: Recursion,
    stop: StoppingRule,
    *,
    x0: Tensor | None = None,
    snapshot_ratio: float | None = None,
    callback: Callable[[Iteration], None] | None = None,
    true_residual: bool = True,
) -> Solution:
    """Iterate until there is an agreed reason to end; without ``true_residual`` the end takes no product.

    Raises:
        ValueError: If snapshot_ratio is out of range.
        RankError: If own work failed on a rank; alone, what it raised.
    """
    keep = _Snapshots(snapshot_ratio)
    first = None if x0 is None else A.apply(x0)

    def begin() -> Reason | None:
        reason = recursion.start(first) or stop(recursion.history)
        _note(recursion, callback)
        return reason

    def go_on() -> Reason | None:
        before = len(recursion.history)
        reason = recursion.advance(product)
        if len(recursion.history) == before:  # a product that made no iteration
            return reason
        ends = stop(recursion.history)
        keep(recursion)
        _note(recursion, callback)
        if reason is Reason.RESIDUAL_REPLACED:
            # the end takes the residual anew by itself; but one that is not believed is no end
            return ends if ends and (recursion.believes or ends is not Reason.RESIDUAL_TOLERANCE) else reason
        return reason or ends

    reason, failure = own_work(begin)
    true_norm = math.nan
    while True:
        if reason is not None and not true_residual:
            agreed = A.agree(reason, failure)
        else:
            product, agreed = recursion.ask(reason, failure)
        if agreed.reason is Reason.NON_FINITE and reason is not Reason.NON_FINITE:
            reason = agreed.reason  # a rank's contribution is broken: no product can be trusted, not even A x
            break
        if not agreed.valid or agreed.reason is not reason:
            reason = agreed.reason
            continue
        if reason is Reason.RESIDUAL_REPLACED:
            reason, failure = own_work(go_on)
            continue
        if reason is not None:
            if true_residual:
                r = recursion.residual(product)
                true_norm = math.sqrt(A.space.dots((r, r))[0])
            break
        reason, failure = own_work(go_on)
    checked = true_residual and stop.target > 0
    if reason is Reason.RESIDUAL_TOLERANCE and checked and not true_norm <= _ACCURACY_SLACK * stop.target:
        reason = Reason.ACCURACY_LOST
    x, last, direction = recursion.end(reason)
    return Solution(
        x,
        reason,
        last.number,
        last.residual_norm,
        true_norm,
        last.model,
        recursion.history,
        keep.upto(last.number, Iterate(last.number, x, last.model)),
        direction,
    )


def zero_solution(like: Tensor) -> Solution:
    """The solution of a system whose right-hand side is zero."""
    start = Iteration(0, 0.0, 0.0, math.nan)
    return Solution(torch.zeros_like(like), Reason.ZERO_RIGHT_HAND_SIDE, 0, 0.0, 0.0, 0.0, [start], [])


def check_preconditioner(preconditioner: object) -> None:
    """Raise TypeError unless this is None or a function."""
    if preconditioner is not None and not callable(preconditioner):
        raise TypeError(
            f"preconditioner must be a function of r, got {type(preconditioner).__name__}; use lambda r: M @ r"
        )


def guarded(space: VectorSpace, preconditioner: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    """The preconditioner, or the identity, so that its failure on one party ends the solve for all."""
    return (lambda r: r) if preconditioner is None else space.guarded(preconditioner)


class _Snapshots:
    """Iterates at geometric spacing, O(log k) vectors."""

    def __init__(self, ratio: float | None) -> None:
        if ratio is not None and not ratio > 1:
            raise ValueError(f"snapshot_ratio must be above 1, got {ratio}")
        self._ratio, self._next = ratio, 1.0
        self._kept: list[Iterate] = []

    def __call__(self, recursion: Recursion) -> None:
        now = recursion.history[-1]
        if self._ratio is not None and now.number >= self._next:
            self._kept.append(Iterate(now.number, recursion.x.clone(), now.model))
            while self._next <= now.number:
                self._next *= self._ratio

    def upto(self, number: int, last: Iterate) -> list[Iterate]:
        """The kept iterates before ``number``, then the last one; nothing if none were asked for."""
        return [] if self._ratio is None else [*(i for i in self._kept if i.number < number), last]


def own_work(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Work that takes no product; what fails in it here (a preconditioner, a callback) is told with the next product."""
    try:
        return work(), None
    except (RankError, CommunicationError):  # from an inner product, in which all parties learn of it
        raise
    except Exception as error:
        return None, error


def _note(recursion: Recursion, callback: Callable[[Iteration], None] | None) -> None:
    if callback is not None:
        callback(recursion.history[-1])
