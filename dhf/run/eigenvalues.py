"""look_at_spectrum: eigenvalues at both ends, trace and density of a problem's matrix at a point."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dhf.coordinator import Coordinator, Verdict
from dhf.estimators import SpectralDensity, TraceEstimate, spectral_density, trace
from dhf.operator import GlobalOperator
from dhf.run.point import Point
from dhf.run.solving import open_operator
from dhf.solvers import Eigenpairs, eigsh

__all__ = ["Spectrum", "Wanted", "look_at_spectrum"]

_BINS, _BAR = 20, 40


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """What is looked at.

    Attributes:
        curvature: ``"hessian"``, ``"ggn"`` or ``"fisher"``.
        parameters: Patterns of the names that the matrix is taken in, or None for all.
        largest, smallest: Eigenvalues at either end; 0 for none.
        tol: Of each, relative to the norm; None for what the dtype allows.
        max_products: Most products for either end; None for the solver's own limit.
        trace_products: Products for the trace; 0 for none.
        density_samples, density_steps: Random vectors for the density, and products for each; 0 for none.
    """

    curvature: str
    parameters: str | None
    largest: int
    smallest: int
    tol: float | None
    max_products: int | None
    trace_products: int
    density_samples: int
    density_steps: int


@dataclasses.dataclass(frozen=True, slots=True)
class Spectrum:
    """What was found; the same on every rank.

    Attributes:
        n: How many eigenvalues there are.
        loss, gradient_norm: The objective's.
        ends: ``"largest"`` and ``"smallest"``, as far as asked for.
        trace: An estimate, or None where none was asked for, or the search was stopped before.
        density: The quadratures, or None likewise.
        products, seconds: What all of it took.
    """

    n: int
    loss: float
    gradient_norm: float
    ends: dict[str, Eigenpairs]
    trace: TraceEstimate | None
    density: SpectralDensity | None
    products: int
    seconds: float

    @property
    def converged(self) -> bool:
        """Whether all eigenvalues that were asked for met the tolerance."""
        return all(found.converged for found in self.ends.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values; ``eigenvalues`` and ``density`` as ``python -m dhf plot --spectrum`` takes them."""
        values = [float(v) for found in self.ends.values() for v in found.values]
        found: dict[str, Any] = {
            "n": self.n,
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
            "products": self.products,
            "seconds": self.seconds,
            "eigenvalues": values,
            **{name: _pairs(pairs) for name, pairs in self.ends.items()},
        }
        if self.trace is not None:
            found["trace"] = dataclasses.asdict(self.trace)
        if self.density is not None:
            grid = self.density.grid()
            density, error = self.density.density(grid)
            found["density"] = {
                "grid": grid.tolist(),
                "values": density.tolist(),
                "standard_error": error.tolist(),
                "width": self.density.width,
                "products": self.density.products,
            }
        return found

    def histogram(self) -> Iterator[tuple[float, float, float]]:
        """Bounds of equal bins from end to end, and about how many eigenvalues are in each."""
        if self.density is None:
            return
        nodes, weights = self.density.nodes, self.density.weights
        low, high = float(nodes.min()), float(nodes.max())
        edges = torch.linspace(low, high, _BINS + 1, dtype=torch.float64)
        place = torch.bucketize(nodes, edges[1:-1])
        for i in range(_BINS):
            share = float((weights * (place == i)).sum()) / len(nodes)
            yield float(edges[i]), float(edges[i + 1]), self.n * share

    def bars(self) -> Iterator[str]:
        """The density as text: a bar for each bin, as long as the logarithm of its count."""
        for low, high, count in self.histogram():
            length = round(_BAR * math.log10(1 + count) / math.log10(1 + self.n))
            bar = "#" * max(length, 1 if count >= 0.5 else 0)
            yield f"{low:>12.4g} to {high:>10.4g}  {count:>10,.1f}  {bar}".rstrip()


def look_at_spectrum(point: Point, wanted: Wanted, coordinator: Coordinator) -> Spectrum:
    """Look at it, over all ranks together.

    Raises:
        UsageError: If more eigenvalues are asked for than there are, or a pattern fits no parameter.
    """
    began = time.perf_counter()
    with open_operator(point, wanted.curvature, coordinator, wanted.parameters) as A:
        n, seed = A.shape[0], point.config.seed
        ends = {}
        for name, k in (("largest", wanted.largest), ("smallest", wanted.smallest)):
            if k:
                ends[name] = eigsh(
                    A,
                    min(k, n),
                    which=name,
                    tol=wanted.tol,
                    max_iterations=wanted.max_products,
                    seed=seed,
                    vectors=False,
                )
        found = density = None
        with contextlib.suppress(_Stopped):
            seen = _Watched(A, coordinator)
            if wanted.trace_products:
                found = trace(seen, products=min(wanted.trace_products, n), seed=seed)
            if wanted.density_samples:
                density = spectral_density(seen, samples=wanted.density_samples, steps=wanted.density_steps, seed=seed)
        norm = math.sqrt(A.space.dots((A.gradient, A.gradient))[0])
        return Spectrum(n, A.loss, norm, ends, found, density, A.products, time.perf_counter() - began)


class _Stopped(Exception):
    """A signal has come; on all ranks, with the same product."""


class _Watched:
    """An operator for estimators, which take all their products unless they are stopped."""

    def __init__(self, A: GlobalOperator, coordinator: Coordinator) -> None:
        self._A, self._coordinator = A, coordinator
        self.shape, self.dtype, self.device, self.space = A.shape, A.dtype, A.device, A.space

    def apply(self, v: Tensor) -> tuple[Tensor, Verdict]:
        """As :meth:`GlobalOperator.apply`; raises _Stopped."""
        if self._coordinator.stopping is not None:
            raise _Stopped
        return self._A.apply(v)


def _pairs(found: Eigenpairs) -> dict[str, Any]:
    return {
        "values": found.values.tolist(),
        "error_bounds": found.error_bounds.tolist(),
        "residual_norms": found.residual_norms.tolist(),
        "reason": found.reason.name,
        "converged": found.converged,
        "products": found.products,
    }
