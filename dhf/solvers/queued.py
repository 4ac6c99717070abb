"""QueuedConjugateGradients: the recursion of cg on a GPU, whose numbers stay there; the host learns of them while it works on.

    host    | step k     | read k                 | step k + 1  | read k + 1
    device  | ...product k ... step k | product k + 1 .............. step k + 1 |

An iteration's numbers (the status word, inner products, α, β) are computed on the device, and a step whose product turns out
not to be what was asked for is a step of length zero. The host copies them once per iteration, and where products are brief it
first lets the device begin with the next, so that the device does not wait for the host's verdict; it is thrown away if the
solve ends. Where nothing in an iteration needs the host, it is recorded and replayed (see dhf/replay.py). All numbers are those
of cg.py, up to rounding in the last digit.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dhf.reason import Reason
from dhf.replay import Replay, SteadyMap
from dhf.solvers.cg import ConjugateGradients
from dhf.solvers.krylov import own_work
from dhf.solvers.linear_operator import Agreement, QueueingOperator
from dhf.solvers.symmetry import SymmetryCheck
from dhf.vector_space import LocalDots

__all__ = ["QueuedConjugateGradients"]

_BRIEF = 5e-3  # seconds; a longer iteration gains nothing by a product ahead of the verdict, and may lose one


class QueuedConjugateGradients(ConjugateGradients):
    """See :class:`ConjugateGradients`; to be used within :func:`dhf.replay.aside`.

    Args:
        A: The operator; its ``queues`` is true.
        b: Right-hand side, shape (n,); on a GPU, or else nothing is gained.
        x0: Start, or None.
        precondition: ``r -> z``; a :class:`dhf.replay.SteadyMap` is recorded with the rest.
        symmetry: Finds out whether A is symmetric.
        limit: Iterations after which the solve ends in any case.
    """

    A: QueueingOperator

    def __init__(
        self,
        A: QueueingOperator,
        b: Tensor,
        x0: Tensor | None,
        precondition: Callable[[Tensor], Tensor] | None,
        symmetry: SymmetryCheck,
        limit: int,
    ) -> None:
        super().__init__(A, b, x0, precondition or (lambda r: r), symmetry)
        self._limit = limit
        self._steady = precondition is None or isinstance(precondition, SteadyMap)
        self._dots = LocalDots()
        self._x_before, self._p_before = torch.empty_like(b), torch.empty_like(b)
        self._begun = self._brief = False
        self._copied = torch.cuda.Event() if b.device.type == "cuda" else None
        self._launch = precondition.launch if isinstance(precondition, SteadyMap) else self.precondition
        self._replays: dict[bool, Replay] = {}
        self._told: list[float] = []
        self._failure: Exception | None = None

    def start(self, first: tuple[Tensor, Agreement] | None) -> Reason | None:
        """Set out from x, of which ``first`` is the product."""
        reason = super().start(first)
        self._z_before = torch.empty(0) if self._z is None else self._z.clone()
        self._rho = torch.tensor(self.rho, dtype=torch.float64, device=self.b.device)
        self._numbers = torch.zeros(self.A.STATUS + 7, dtype=torch.float64, device=self.b.device)
        self._host = torch.zeros(self.A.STATUS + 7, dtype=torch.float64, pin_memory=self._copied is not None)
        return reason

    def ask(self, reason: Reason | None, failure: Exception | None) -> tuple[Tensor, Agreement]:
        """A p and the step along it; or A x, where the solve is to end."""
        begun, self._begun = self._begun, False
        failure = failure or self._failure
        if reason is not None or failure is not None:
            return super().ask(reason, failure)
        began = time.perf_counter()
        if not begun:
            self.A.start(self.p)
        product, word, diagonal = self.A.send()
        _, self._failure = own_work(lambda: self._queue_step(product, word, diagonal))
        if self._failure is not None:  # the others read a verdict now, and learn of it with the next product
            self._numbers[: len(word)].copy_(word)
        self._host.copy_(self._numbers, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        if self._brief and self._failure is None and self.k + 1 < self._limit:
            self.A.start(self.p)
            self._begun = True
        if self._copied is not None:
            self._copied.synchronize()
        self._brief = time.perf_counter() - began < _BRIEF
        told = self._host.tolist()
        agreed = self.A.read(told[: len(word)], self.p)
        self._told = told[len(word) :]
        self._begun &= agreed.valid and agreed.reason is None
        return product, agreed

    def advance(self, product: Tensor) -> Reason | None:
        """Take note of the step that :meth:`ask` has made; raises what failed in it."""
        if self._failure is not None:
            raise self._failure
        pAp, pp, ApAp, zAp, rr, rho, zAp_next = self._told
        violated, beta = False, rho / self.rho if self.rho else 0.0
        if self._z is not None and self._symmetry is not None:
            violated = self._symmetry.violated(pAp - zAp, math.sqrt(pp), math.sqrt(ApAp))
            if self._symmetry.wanted:
                self._symmetry.expect(beta * (zAp_next + beta * pAp), beta * math.sqrt(pp))
            else:
                self._z = None
        threshold = self.least_curvature(pp, ApAp)
        self._before = None if pAp > 4 * threshold else (self._x_before, self._p_before)
        return self.account(pAp, pp, rr, rho, threshold) or (Reason.NOT_SYMMETRIC if violated else None)

    def _queue_step(self, Ap: Tensor, word: Tensor, diagonal: float) -> None:
        """Launch a step; by a replay, where it may be."""
        looking = self._z is not None
        if not self._steady:
            self._step(Ap, word, diagonal, looking)
            return
        if isinstance(self.precondition, SteadyMap):
            self.precondition.note()
        if looking not in self._replays:
            self._replays[looking] = Replay(Ap.device, warm=bool(self._replays))
        self._replays[looking](functools.partial(self._step, Ap, word, diagonal, looking))

    def _step(self, Ap: Tensor, word: Tensor, diagonal: float, looking: bool) -> None:
        """The iteration, a null one where the word says anything; with inner products of z before and now, if it is looked at."""
        good = (word == 0).all()
        Ap.add_(self.p, alpha=diagonal)
        first = self._dots((self.p, Ap), (self.p, self.p), (Ap, Ap), *([(self._z_before, Ap)] if looking else []))
        alpha = torch.where(good & (first[0] != 0), self._rho / first[0], 0.0).to(Ap.dtype)
        self._x_before.copy_(self.x)
        self._p_before.copy_(self.p)
        self.x.addcmul_(self.p, alpha)
        self.r.addcmul_(Ap, alpha, value=-1)
        z = self._launch(self.r)
        second = self._dots((self.r, self.r), (self.r, z), *([(z, Ap)] if looking else []))
        rho = torch.where(good, second[1], self._rho)
        beta = torch.where(self._rho != 0, rho / self._rho, 0.0).to(Ap.dtype)
        torch.where(good, torch.addcmul(z, self.p, beta), self.p, out=self.p)
        self._rho.copy_(rho)
        nothing = first.new_zeros(0 if looking else 1)
        torch.cat([word.double(), first, nothing, second, nothing], out=self._numbers)
        if looking:
            self._z_before.copy_(z)
