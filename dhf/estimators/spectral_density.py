"""spectral_density: how many eigenvalues lie where, by stochastic Lanczos quadrature.

    tr f(A) / n  ≈  mean over random v of  vᵀ f(A) v / vᵀv  ≈  mean of  Σ_j τ_j² f(θ_j)

θ the eigenvalues of the small matrix that Lanczos makes from v, τ the first components of its eigenvectors. The density is
that of f = a Gaussian around each point.

Source: Golub & Welsch (1969); Lin, Saad & Yang (2016); Ghorbani, Krishnan & Xiao (2019).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dhf.errors import NonFiniteError
from dhf.estimators.products import Products
from dhf.reason import Reason
from dhf.solvers.lanczos import Lanczos
from dhf.solvers.random_vectors import normal_vector, sign_vector

__all__ = ["SpectralDensity", "spectral_density"]


@dataclasses.dataclass(frozen=True, slots=True)
class SpectralDensity:
    """Nodes and weights of as many quadratures as random vectors; float64 on the CPU.

    Attributes:
        nodes: Shape (samples, steps), ascending within each.
        weights: The same shape; each row adds up to 1.
        n: How many eigenvalues there are.
        products: Products taken.
    """

    nodes: Tensor
    weights: Tensor
    n: int
    products: int

    @property
    def width(self) -> float:
        """A width for Gaussians that shows the whole range: a hundredth of it."""
        return max(float(self.nodes.max() - self.nodes.min()), float(self.nodes.abs().max()) * 1e-6, 1e-300) / 100

    def grid(self, points: int = 400, width: float | None = None) -> Tensor:
        """Points at which to look at the density, from three widths below the lowest node to as many above the highest."""
        margin = 3 * (self.width if width is None else width)
        low, high = float(self.nodes.min()) - margin, float(self.nodes.max()) + margin
        return torch.linspace(low, high, points, dtype=torch.float64)

    def density(self, points: Tensor, width: float | None = None) -> tuple[Tensor, Tensor]:
        """The density at some points, and its standard error over random vectors (nan from one); it integrates to 1.

        Args:
            points: Any shape, in the units of the eigenvalues.
            width: Standard deviation of the Gaussians, in the same units; :attr:`width` by default.
        """
        sigma = self.width if width is None else width
        if not sigma > 0:
            raise ValueError(f"width must be positive, got {sigma}")
        at = points.double().cpu()[..., None, None]
        bells = torch.exp(-0.5 * ((at - self.nodes) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
        return _mean_and_error((bells * self.weights).sum(-1))

    def trace_of(self, function: Callable[[Tensor], Tensor]) -> tuple[float, float]:
        """The trace of a function of A, such as ``torch.exp``, and its standard error over random vectors (nan from one)."""
        mean, error = _mean_and_error(self.n * (self.weights * function(self.nodes)).sum(-1))
        return float(mean), float(error)


def spectral_density(operator: Any, *, samples: int = 8, steps: int = 60, seed: int = 0) -> SpectralDensity:
    """Estimate the distribution of a symmetric operator's eigenvalues.

    Args:
        operator: A GlobalOperator, a square tensor, or any object with ``matvec`` (shape (n,) to shape (n,)) and ``shape``; one
            without a ``dtype`` is taken for float64.
        samples: Random vectors. The density's error falls with the root of n times this number.
        steps: Products for each, n at most; as many vectors are held. More show finer structure.
        seed: Names the random vectors; the same on all ranks.

    Returns:
        A SpectralDensity, the same on every rank. Every moment up to ``2 steps - 1`` of each quadrature is that of its vector.

    Raises:
        ValueError: If samples or steps is out of range.
        NonFiniteError: If a product is not finite.
        RankError: If code failed on a rank.

    Example:
        >>> import torch
        >>> found = spectral_density(torch.eye(4, dtype=torch.float64), samples=1, steps=2)
        >>> found.nodes[0], found.weights[0]
        (tensor([1., 1.], dtype=torch.float64), tensor([1., 0.], dtype=torch.float64))
    """
    if samples < 1 or steps < 1:
        raise ValueError(f"samples and steps must be at least 1, got {samples} and {steps}")
    A = Products(operator)
    steps = min(steps, A.n)
    quadratures = [_quadrature(A, steps, seed, i) for i in range(samples)]
    nodes, weights = (torch.stack(parts) for parts in zip(*quadratures, strict=True))
    return SpectralDensity(nodes, weights, A.n, A.count)


def _quadrature(A: Products, steps: int, seed: int, i: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights from one random vector."""

    def draw(number: int) -> Tensor:
        # where Lanczos ends early it goes on with another vector, of weight zero, so that all parties take as many products
        return A.piece(normal_vector(seed, (i + 1 << 24) + number, A.whole))

    lanczos = Lanczos(A.space, A.n, A.piece(sign_vector(seed, i, A.whole)), steps, draw)
    for _ in range(steps):
        if lanczos.advance(A(lanczos.next)) is Reason.NON_FINITE:
            raise NonFiniteError("a product holds NaN or infinity; look at the operator's data")
    nodes, vectors, _ = lanczos.ritz()
    return nodes, vectors[0].square()


def _mean_and_error(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Over the last dimension."""
    count = samples.shape[-1]
    error = samples.std(-1) / math.sqrt(count) if count > 1 else torch.full(samples.shape[:-1], math.nan).double()
    return samples.mean(-1), error
