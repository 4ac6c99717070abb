"""trace and diagonal: what the large eigenvalues contribute exactly, and an estimate of the rest with its standard error.

    A = P A P + P A R + R A P + R A R        P = QQᵀ, R = I - P, Q an orthonormal basis of A S for random signs S

    tr A   = tr QᵀAQ + tr RAR                          tr RAR   ≈ mean of zᵀR A R z
    diag A = diag(PA + AP - PAP) + diag RAR            diag RAR ≈ mean of z ∘ R A R z        z random signs

A third of the products makes A S, a third A Q, and a third the estimate. Without Q this is Hutchinson's; where eigenvalues fall
off quickly, RAR is small, and so is the error. With as many products as parameters both are exact.

Source: Hutchinson (1990); Bekas, Kokiopoulou & Saad (2007) for the diagonal; Meyer, Musco, Musco & Woodruff, "Hutch++" (2021).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from dhf.estimators.products import Products
from dhf.solvers.basis import Basis
from dhf.solvers.random_vectors import sign_vector

__all__ = ["DiagonalEstimate", "TraceEstimate", "diagonal", "trace"]


@dataclasses.dataclass(frozen=True, slots=True)
class TraceEstimate:
    """A trace.

    Attributes:
        value: The estimate.
        standard_error: Of the value, from the spread over random vectors; 0.0 where it is exact, nan from a single random vector.
        products: Products taken.
    """

    value: float
    standard_error: float
    products: int


@dataclasses.dataclass(frozen=True, slots=True)
class DiagonalEstimate:
    """A diagonal.

    Attributes:
        values: The estimate, as the operator stores vectors: shape (n,), its dtype and device.
        standard_error: Of each value, likewise; 0 where they are exact, nan from a single random vector.
        products: Products taken.
    """

    values: Tensor
    standard_error: Tensor
    products: int


def trace(operator: Any, *, products: int = 60, deflate: bool = True, seed: int = 0) -> TraceEstimate:
    """Estimate the trace of a symmetric operator (Hutch++).

    Args:
        operator: A GlobalOperator, a square tensor, or any object with ``matvec`` (shape (n,) to shape (n,)) and ``shape``; one
            without a ``dtype`` is taken for float64.
        products: How many to take, at least 1; n of them give the exact trace.
        deflate: Whether the largest eigenvalues are taken out first, by a third as many vectors as products. Without, this is
            Hutchinson's estimator.
        seed: Names the random vectors; the same on all ranks.

    Returns:
        A TraceEstimate, the same on every rank.

    Raises:
        ValueError: If products is out of range.
        NonFiniteError: If a product is not finite.
        RankError: If code failed on a rank.

    Example:
        >>> import torch
        >>> trace(torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)), products=3)
        TraceEstimate(value=6.0, standard_error=0.0, products=3)
    """
    A = Products(operator)
    if _exact(A, products):
        return TraceEstimate(math.fsum(A.inner(e, A(e)) for e in _units(A)), 0.0, A.count)
    split = _Split(A, _deflated(products, deflate), seed)
    samples = [split.sample(products, i)[0] for i in range(products - A.count)]
    mean = math.fsum(samples) / len(samples)
    return TraceEstimate(split.trace + mean, _standard_error(samples, mean), A.count)


def diagonal(operator: Any, *, products: int = 120, deflate: bool = True, seed: int = 0) -> DiagonalEstimate:
    """Estimate the diagonal of a symmetric operator.

    Args:
        operator: As in :func:`trace`.
        products: How many to take, at least 1; n of them give the exact diagonal.
        deflate: As in :func:`trace`.
        seed: Names the random vectors; the same on all ranks.

    Returns:
        A DiagonalEstimate. Its standard errors are themselves estimates, from a third of the products each.

    Raises:
        ValueError: If products is out of range.
        NonFiniteError: If a product is not finite.
        RankError: If code failed on a rank.

    Example:
        >>> import torch
        >>> diagonal(torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64), products=2).values
        tensor([3., 2.], dtype=torch.float64)
    """
    A = Products(operator)
    like = A.piece(A.whole)
    if _exact(A, products):
        total = torch.zeros_like(like, dtype=torch.float64)
        for e in _units(A):
            product = A(e)
            A.inner(e, product)
            total.addcmul_(e, product)
        return DiagonalEstimate(total.to(like.dtype), torch.zeros_like(like), A.count)
    split = _Split(A, _deflated(products, deflate), seed)
    mean, squares = torch.zeros_like(like, dtype=torch.float64), torch.zeros_like(like, dtype=torch.float64)
    count = products - A.count
    for i in range(count):
        _, z, image = split.sample(products, i)
        sample = (z * image).double()
        apart = sample - mean  # Welford's recurrence, which does not cancel
        mean.add_(apart, alpha=1 / (i + 1))
        squares.addcmul_(apart, sample - mean)
    error = (squares / (count * (count - 1))).sqrt() if count > 1 else torch.full_like(squares, math.nan)
    return DiagonalEstimate((split.diagonal + mean).to(like.dtype), error.to(like.dtype), A.count)


class _Split:
    """The exact part of A, and samples of the rest.

    Attributes:
        trace: tr QᵀAQ.
        diagonal: Of PA + AP - PAP, float64.
    """

    def __init__(self, A: Products, rank: int, seed: int) -> None:
        self._A, self._seed = A, seed
        like = A.piece(A.whole)
        self._basis = Basis(A.space, like, rank)
        for i in range(rank):
            self._basis.append(A(A.piece(sign_vector(seed, i, A.whole))))
        self.trace = 0.0
        self.diagonal = torch.zeros_like(like, dtype=torch.float64)
        for q in self._basis.rows:
            image = A(q).clone()
            self.trace += A.inner(q, image)
            self.diagonal.addcmul_(q, image)
            self._basis.orthogonalise(image)
            self.diagonal.addcmul_(q, image)

    def sample(self, first: int, i: int) -> tuple[float, Tensor, Tensor]:
        """``zᵀRARz``, z, and RARz for the i-th z of those that are numbered from ``first``."""
        A = self._A
        z = A.piece(sign_vector(self._seed, first + i, A.whole))
        rest = z.clone()
        self._basis.subtract(rest, self._basis.inner(rest))
        image = A(rest).clone()
        value = A.inner(rest, image)
        self._basis.subtract(image, self._basis.inner(image))
        return value, z, image


def _exact(A: Products, products: int) -> bool:
    if products < 1:
        raise ValueError(f"products must be at least 1, got {products}")
    return products >= A.n


def _deflated(products: int, deflate: bool) -> int:
    """How many vectors are taken out, each at two products."""
    return products // 3 if deflate else 0


def _units(A: Products) -> Any:
    """The unit vectors, one after the other."""
    for i in range(A.n):
        e = torch.zeros_like(A.whole)
        e[i] = 1.0
        yield A.piece(e)


def _standard_error(samples: list[float], mean: float) -> float:
    count = len(samples)
    if count < 2:
        return math.nan
    return math.sqrt(math.fsum((s - mean) ** 2 for s in samples) / (count * (count - 1)))
