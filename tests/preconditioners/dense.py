"""A matrix in an operator's place, for preconditioners that take products and nothing else."""

from __future__ import annotations

import math
import types
from collections.abc import Callable

import torch
from torch import Tensor

from dhf.comm import Serial
from dhf.coordinator import Coordinator
from dhf.vector_space import Replicated


class Matrix:
    """A dense matrix as an undamped operator; notes the vectors that it multiplies."""

    def __init__(self, A: Tensor, weight_decay: float = 0.0) -> None:
        self.A, self.shape, self.dtype, self.device = A, tuple(A.shape), A.dtype, A.device
        self.objective = types.SimpleNamespace(weight_decay=weight_decay)
        self.multiplied: list[Tensor] = []
        self.comm, self.space, self.in_pieces = Serial(), Replicated(), False
        self.gradient = torch.zeros(len(A), dtype=A.dtype)
        self.coordinator = Coordinator(self.comm)

    def matvec(self, v: Tensor) -> Tensor:
        self.multiplied.append(v.clone())
        return self.A @ v


def vectors(n: int, number: int, seed: int = 0) -> Tensor:
    """Columns of random numbers, shape (n, number)."""
    return torch.randn(n, number, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spectrum(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(vectors(n, n, seed))
    return (Q * eigenvalues) @ Q.T


def powers(first: float, last: float, n: int) -> Tensor:
    """n eigenvalues evenly spaced in their logarithms."""
    return torch.logspace(math.log10(first), math.log10(last), n, dtype=torch.float64)


def as_matrix(precondition: Callable[[Tensor], Tensor], n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The dense matrix of a preconditioner, column by column."""
    return torch.stack([precondition(e) for e in torch.eye(n, dtype=dtype)], dim=1)


def assert_positive_definite(precondition: Callable[[Tensor], Tensor], n: int, rtol: float = 1e-10) -> None:
    """z·r > 0 and u·Mv = v·Mu for random vectors, r left alone."""
    for u, v in vectors(n, 20, 3).T.reshape(10, 2, n):
        kept = v.clone()
        Mu, Mv = precondition(u), precondition(v)
        assert torch.equal(v, kept)
        assert float(v @ Mv) > 0
        assert abs(float(u @ Mv - v @ Mu)) <= rtol * float(u.norm() * Mv.norm())
