"""Matrices with known eigenvalues, right-hand sides, and operators that count or fail."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def orthogonal(n: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix."""
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]


def with_eigenvalues(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    q = orthogonal(len(values), seed)
    A = (q * values) @ q.T
    return 0.5 * (A + A.T)


def spd(n: int, condition: float = 100.0, seed: int = 0) -> Tensor:
    """A symmetric matrix with eigenvalues from 1 to ``condition``, evenly spaced in their logarithm."""
    return with_eigenvalues(torch.logspace(0, math.log10(condition), n, dtype=torch.float64), seed)


def indefinite(n: int, condition: float = 100.0, seed: int = 0) -> Tensor:
    """The same with every other eigenvalue negative."""
    values = torch.logspace(0, math.log10(condition), n, dtype=torch.float64)
    values[1::2] *= -1
    return with_eigenvalues(values, seed)


def vector(n: int, seed: int = 1) -> Tensor:
    """Normal random numbers."""
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def model(A: Tensor, b: Tensor, x: Tensor) -> float:
    """``½ xᵀA x - bᵀx``."""
    return float(0.5 * x @ A @ x - b @ x)


class Counting:
    """An operator that counts its products."""

    def __init__(self, A: Tensor) -> None:
        self.A, self.products = A, 0

    def matvec(self, v: Tensor) -> Tensor:
        self.products += 1
        return self.A @ v


class NanAt(Counting):
    """An operator one of whose products is NaN."""

    def __init__(self, A: Tensor, product: int) -> None:
        super().__init__(A)
        self._bad = product

    def matvec(self, v: Tensor) -> Tensor:
        return super().matvec(v) * (math.nan if self.products == self._bad else 1.0)
