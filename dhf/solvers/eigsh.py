"""eigsh: a few eigenvalues and eigenvectors of any symmetric operator, by thick-restarted Lanczos.

Each step takes one product, and two passes over the basis. That a Ritz pair has converged is seen in the small matrix alone; the
true residuals take one product per pair at the end, and give Rayleigh quotients, whose errors are those residuals squared.

Every stop and every drawn direction is agreed, as in krylov.py; when the basis restarts, and with how many vectors, depends on
counts alone.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from dhf.reason import Reason
from dhf.solvers.krylov import own_work
from dhf.solvers.lanczos import Lanczos
from dhf.solvers.linear_operator import AgreeingOperator, as_operator, empty_vector
from dhf.solvers.random_vectors import normal_vector

__all__ = ["WHICH", "Eigenpairs", "eigsh"]

WHICH = ("largest", "smallest", "magnitude")
_SETTLED = 10  # vectors after a new start by which an eigenvalue that was missed shows
_ACCURACY_SLACK = 2.0
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-5}


@dataclasses.dataclass(frozen=True, slots=True)
class Eigenpairs:
    """What was found of a spectrum.

    Attributes:
        values: Eigenvalues in the order asked for, float64 on the CPU, shape (k,); fewer if the search was cut short before it
            had so many.
        vectors: Unit eigenvectors, one per column, shape (n, k), the operator's dtype and device; None if not asked for.
        error_bounds: ``‖A x - λ x‖`` as the recursion has it, shape (k,): an eigenvalue of A lies within this distance of λ, up
            to rounding.
        residual_norms: ``‖A x - λ x‖`` from a product with each vector, shape (k,), which bounds the error of λ in the same way,
            rounding included; nan where that was not taken.
        reason: Why the search ended; ``reason > 0`` means that all pairs have converged.
        products: Products taken.
        restarts: How often the basis was replaced by its best vectors.
    """

    values: Tensor
    vectors: Tensor | None
    error_bounds: Tensor
    residual_norms: Tensor
    reason: Reason
    products: int
    restarts: int

    @property
    def converged(self) -> bool:
        """Whether all pairs met the tolerance."""
        return self.reason.converged


def eigsh(
    operator: Any,
    k: int = 6,
    *,
    which: str = "largest",
    tol: float | None = None,
    max_iterations: int | None = None,
    basis: int | None = None,
    seed: int = 0,
    v0: Tensor | None = None,
    vectors: bool = True,
    true_residual: bool = True,
) -> Eigenpairs:
    """Find k eigenvalues at one end of the spectrum of a symmetric operator, and their eigenvectors.

    Args:
        operator: A GlobalOperator, a square tensor, or any object with ``matvec`` (shape (n,) to shape (n,)) and ``shape``; one
            without a ``dtype`` is taken for float64.
        k: How many, from 1 to n.
        which: ``"largest"`` or ``"smallest"`` by value, or largest in ``"magnitude"``.
        tol: A pair has converged where ``‖A x - λ x‖ ≤ tol·‖A‖``, with the largest absolute value seen for the norm. Then λ is
            off by no more than that, and by its square over the distance to the other eigenvalues where these are further away.
            1e-8 in float64 and 1e-5 in float32 by default, whose products round at 1e-7 to 1e-6.
        max_iterations: Most products before the end; 50 times ``basis`` by default.
        basis: Most vectors held, n at most, above k; ``4k + 20`` by default. With fewer, memory is saved and more
            products are taken.
        seed: Names the start and other directions that are drawn; the same on all ranks.
        v0: Start, shape (n,) (or a piece of it where vectors are sharded); drawn by default.
        vectors: Whether eigenvectors are wanted.
        true_residual: Whether to take the k products at the end that tell the true residuals. Without, an eigenvalue is as
            accurate as the recursion has it, in float32 to about 1e-6 of the norm.

    Returns:
        Eigenpairs; its reason says why the search ended. Never raises on non-convergence. Each vector has a positive inner
        product with the start, so that its sign is always the same. If the recursion claims convergence and a true
        residual misses the tolerance by more than a factor of 2, the reason is ACCURACY_LOST.

        An eigenvalue of multiplicity above 1 is found as often as it is where the basis spans the whole space (n up to
        ``basis``), or where the Krylov space of the start is exhausted, as with few distinct eigenvalues. Else
        the further copies appear by rounding alone, and often not before the search ends; the vectors of another seed show
        whether there are any.

    Raises:
        ValueError: If shapes or dtypes differ, v0 is zero, or k, which, tol, basis or max_iterations is out of range.
        TypeError: If the operator cannot multiply.
        RankError: If code failed on a rank.

    Source: Wu & Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems" (2000).

    Example:
        >>> import torch
        >>> found = eigsh(torch.diag(torch.arange(1.0, 8.0, dtype=torch.float64)), k=2)
        >>> found.values.round(decimals=12), found.reason.name, found.products
        (tensor([7., 6.], dtype=torch.float64), 'RESIDUAL_TOLERANCE', 9)
    """
    like = empty_vector(operator, v0)
    A = as_operator(operator)
    n = int(operator.shape[0]) if v0 is None else A.space.size(v0)
    capacity = _capacity(n, k, basis)
    if which not in WHICH:
        raise ValueError(f"which {which!r} is unknown; choose from {', '.join(WHICH)}")
    if tol is not None and not 0 <= tol < 1:
        raise ValueError(f"tol must be in [0, 1), got {tol}")
    if max_iterations is not None and max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
    if v0 is not None and not (0 < A.space.dots((v0, v0))[0] < math.inf):
        raise ValueError("v0 must not be zero, and must be finite; give another start or leave it out")

    def draw(number: int) -> Tensor:
        whole = like if v0 is None else like.new_empty(n)
        return A.space.piece(normal_vector(seed, number, whole))

    def begin() -> _Search:
        start = draw(0) if v0 is None else v0.detach()
        lanczos = Lanczos(A.space, n, start, capacity, lambda number: draw(number + 1))
        wanted = _TOLERANCE[like.dtype] if tol is None else tol
        return _Search(lanczos, start, k, which, wanted, max_iterations or 50 * capacity)

    search, failure = own_work(begin)
    reason: Reason | None = None
    while True:
        if search is None or failure is not None or reason not in (None, Reason.INVARIANT_SUBSPACE):
            agreed = A.agree(reason, failure)
            assert search is not None  # a failure has been raised
            if agreed.valid and agreed.reason is reason:
                break
        else:
            product, agreed = A.apply(search.lanczos.next, reason)
        if agreed.reason is Reason.NON_FINITE:  # all have learned of it
            reason = agreed.reason
            break
        if not agreed.valid or agreed.reason is not reason:
            reason = agreed.reason
            _, failure = own_work(lambda s=search, r=reason: s.follow(r))  # type: ignore[misc]
            continue
        search.products += 1  # one that was mixed counts nowhere, so that all have the same number
        reason, failure = own_work(lambda s=search, p=product: s.advance(p))  # type: ignore[misc]
    assert search is not None
    assert reason is not None
    return search.end(A, reason, vectors=vectors, true_residual=true_residual)


class _Search:
    """The wanted end of the spectrum, as far as it is known."""

    def __init__(self, lanczos: Lanczos, start: Tensor, k: int, which: str, tol: float, limit: int) -> None:
        self.lanczos, self.products, self.restarts = lanczos, 0, 0
        self._start, self._k, self._which, self._tol, self._limit = start, k, which, tol, limit
        self._due = k  # vectors at which to look next
        self._since = 0  # vectors since a subspace was exhausted
        self._before: Tensor | None = None  # what was wanted when that last happened

    def advance(self, product: Tensor) -> Reason | None:
        """Take in a product; why the search ends, or that it goes on with a drawn direction, or None."""
        lanczos = self.lanczos
        reason = lanczos.advance(product)
        if reason in (Reason.NON_FINITE, Reason.NOT_SYMMETRIC):
            return reason
        # to tolerance the vectors map into one another; what follows starts anew, drawn or out of rounding
        exhausted = lanczos.beta <= self._tol * lanczos.scale
        self._since = 0 if exhausted else self._since + 1
        if lanczos.complete or (self._settles() if exhausted else self._has_converged()):
            return Reason.RESIDUAL_TOLERANCE
        if self.products >= self._limit:
            return Reason.ITERATION_LIMIT
        self._make_room()
        return reason

    def follow(self, reason: Reason | None) -> None:
        """Do as all have agreed, which is not what was proposed here."""
        if reason in (None, Reason.INVARIANT_SUBSPACE):
            self.lanczos.follow(reason)
            self._make_room()  # where this rank saw an end, and the others do not

    def _make_room(self) -> None:
        """Restart if the basis is full."""
        lanczos = self.lanczos
        if not lanczos.full or lanczos.complete:
            return
        values, vectors, _ = lanczos.ritz()
        # between the wanted ones alone, which converge slowly, and so many that no room is left
        kept = self._order(values)[: self._k + (lanczos.j - self._k) // 3]
        lanczos.restart(values[kept], vectors[:, kept])
        self.restarts += 1
        self._due = lanczos.j + 1

    def end(self, A: AgreeingOperator, reason: Reason, *, vectors: bool, true_residual: bool) -> Eigenpairs:
        """The pairs where a search that ends for this reason stands."""
        lanczos = self.lanczos
        if lanczos.j == 0:
            none = torch.zeros(0, dtype=torch.float64)
            found = lanczos.next.new_zeros(len(lanczos.next), 0) if vectors else None
            return Eigenpairs(none, found, none, none, reason, self.products, 0)
        ritz, small, bounds = lanczos.ritz()
        order = self._order(ritz)[: self._k]
        values, bounds, small = ritz[order], bounds[order], small[:, order]
        norms = torch.full_like(values, math.nan)
        scale = float(ritz.abs().max())
        checking = true_residual and reason not in (Reason.NON_FINITE, Reason.INTERRUPTED, Reason.TIME_LIMIT)
        basis, found = lanczos.basis, None
        if vectors or checking:
            _, failure = own_work(lambda: self._combine(small))
            A.agree(reason, failure)
            if checking:
                values, norms, reason = self._check(A, values, reason, scale)
            order = self._order(values)
            values, bounds, norms = values[order], bounds[order], norms[order]
            found = basis.rows[order.to(basis.rows.device)].T if vectors else None
        return Eigenpairs(values, found, bounds, norms, reason, self.products, self.restarts)

    def _has_converged(self) -> bool:
        """Whether the bounds of all wanted pairs are met, and what a new start may have to add has been seen."""
        lanczos = self.lanczos
        if lanczos.j < self._due or (self._before is not None and self._since < _SETTLED):
            return False
        values, _, bounds = lanczos.ritz()
        wanted = self._order(values)[: self._k]
        apart = float(bounds[wanted].max()) / (float(values.abs().max()) or 1.0)
        # a look costs j³; bounds seldom fall fourfold in a step
        least = math.ceil(math.log(max(apart, 1e-300) / max(self._tol, 1e-300), 4)) if apart else 0
        self._due = lanczos.j + max(1, min(least, lanczos.j // 4))
        return apart <= self._tol

    def _settles(self) -> bool:
        """Whether a subspace that has just been exhausted added nothing to what was wanted before it."""
        values, before = self.lanczos.ritz()[0], self._before
        self._before = values[self._order(values)[: self._k]]
        if before is None or len(before) < self._k:
            return False
        slack = max(self._tol, 100 * torch.finfo(self._start.dtype).eps) * float(values.abs().max())
        return float((self._before - before).abs().max()) <= slack

    def _order(self, values: Tensor) -> Tensor:
        """Indices, what is wanted most first."""
        keys = {"largest": values, "smallest": -values, "magnitude": values.abs()}[self._which]
        return torch.argsort(keys, descending=True, stable=True)

    def _combine(self, small: Tensor) -> None:
        """Replace the basis by Ritz vectors, each on the side of the start."""
        basis = self.lanczos.basis
        basis.size = self.lanczos.j
        basis.combine(small)
        along = basis.inner(self._start).to(basis.rows)
        basis.rows[: basis.size].mul_(torch.where(along < 0, -1.0, 1.0)[:, None])

    def _check(
        self, A: AgreeingOperator, values: Tensor, reason: Reason, scale: float
    ) -> tuple[Tensor, Tensor, Reason]:
        """Rayleigh quotients, true residual norms, and the reason where these do not bear it out."""
        space, found, norms = A.space, values.clone(), torch.full_like(values, math.nan)
        for i, x in enumerate(self.lanczos.basis.rows[: len(values)]):
            product, agreed = A.apply(x, reason)
            product, self.products = product.detach(), self.products + 1
            if agreed.reason is Reason.NON_FINITE:
                return found, norms, Reason.NON_FINITE
            xAx, xx = space.dots((x, product), (x, x))
            found[i] = xAx / xx
            r = torch.sub(product, x, alpha=float(found[i]))
            norms[i] = math.sqrt(space.dots((r, r))[0])
        missed = not float(norms.max()) <= _ACCURACY_SLACK * max(
            self._tol * scale, 100 * torch.finfo(self._start.dtype).eps * scale
        )
        return found, norms, Reason.ACCURACY_LOST if missed and reason.converged else reason


def _capacity(n: int, k: int, basis: int | None) -> int:
    """How many vectors are held."""
    if not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to n = {n}, got {k}")
    if basis is not None and basis <= k and basis < n:
        raise ValueError(f"basis must be above k = {k}, got {basis}")
    return min(n, 4 * k + 20 if basis is None else basis)
