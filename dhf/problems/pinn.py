"""Physics-informed networks: a partial differential equation as residuals of a tanh network, with a known exact solution.

A sample is one point: in the interior its residual is that of the equation, on the boundary that of the condition there,

    r_i = √w_i (D u(x_i) - f_i)      D = -Δ or ∂ₜ + β∂ₓ inside, D = 1 on the boundary,

so that the objective is ``1/2N Σ r_i²`` over all points. Derivatives in the inputs are carried forward through the layers
(value, first derivatives and Laplacian side by side), which costs one matrix product per layer and no inner autograd.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dhf.errors import UsageError
from dhf.objective import LeastSquares
from dhf.problems.options import require_finite, require_whole
from dhf.problems.problem import Problem, match_module

__all__ = ["PointResiduals", "TanhNetwork", "convection", "poisson"]


class TanhNetwork(torch.nn.Module):
    """A network of two inputs and one output with tanh hidden layers, and its derivatives in the inputs.

    Args:
        widths: Units of each hidden layer.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        sizes = [2, *widths, 1]
        self._layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        self.layers = torch.nn.ModuleList(self._layers)
        for layer in self._layers:
            torch.nn.init.xavier_normal_(layer.weight)
            torch.nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """u at points of shape (N, 2), shape (N,)."""
        h = x
        for layer in self._layers[:-1]:
            h = torch.tanh(layer(h))
        return self._layers[-1](h)[:, 0]

    def derivatives(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u, its gradient and its Laplacian at points of shape (N, 2): shapes (N,), (2, N) and (N,).

        Source: the forward Laplacian, Li et al., "A computational framework for neural network-based variational Monte
        Carlo with Forward Laplacian" (2024); here for a plain network.
        """
        first = self._layers[0]
        z, slopes = first(x), first.weight.T.unsqueeze(1)  # (2, 1, width): the same at every point
        curvature: Tensor | None = None
        for layer in self._layers[1:]:
            h = torch.tanh(z)
            rise = 1 - h * h
            bend = -2 * h * rise * slopes.square().sum(0)
            curvature = bend if curvature is None else rise * curvature + bend
            stacked = torch.cat([h.unsqueeze(0), rise * slopes, curvature.unsqueeze(0)]) @ layer.weight.T
            z, slopes, curvature = stacked[0] + layer.bias, stacked[1:3], stacked[3]
        assert curvature is not None
        return z[:, 0], slopes[..., 0], curvature[:, 0]


class PointResiduals(LeastSquares):
    """The residuals of an equation at points; a batch is ``(points, weights, values, boundary)``.

    Args:
        network: The solution u.
        equation: ``equation(first derivatives (2, N), Laplacian (N,)) -> D u`` of shape (N,).
        weight_decay: As in Objective.
    """

    def __init__(
        self, network: TanhNetwork, equation: Callable[[Tensor, Tensor], Tensor], *, weight_decay: float = 0.0
    ) -> None:
        super().__init__(network, weight_decay=weight_decay)
        self.network, self.equation = network, equation

    def outputs(self, batch: Any) -> Tensor:
        """``√w (D u - f)``, shape (N,)."""
        points, weights, values, boundary = batch
        u, slopes, laplacian = self.network.derivatives(points)
        return weights.sqrt() * (torch.where(boundary, u, self.equation(slopes, laplacian)) - values)


def poisson(
    widths: Sequence[int] = (64,), points: int = 30, boundary_weight: float = 100.0, frequency: int = 1
) -> Problem:
    """``-Δu = f`` on the unit square with u = 0 on its boundary, solved by ``u = sin(πkx) sin(πky)``.

    Args:
        widths: Units of each hidden layer.
        points: The interior has ``points²`` of them on a regular grid, the boundary ``4 (points + 1)``.
        boundary_weight: w on the boundary; 1 inside. The equation holds second derivatives, (πk)² times larger than u, and the
            boundary would hardly count otherwise.
        frequency: k, a whole number.
    """
    _check(widths, points, boundary_weight)
    require_whole(1, frequency=frequency)  # the solution must vanish on the boundary
    k = math.pi * frequency

    def exact(p: Tensor) -> Tensor:
        return torch.sin(k * p[:, 0]) * torch.sin(k * p[:, 1])

    t = torch.arange(points + 1, dtype=torch.float64) / (points + 1)
    inside = _grid(t[1:], t[1:])
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    edge = torch.cat([torch.stack(pair, 1) for pair in ((t, zero), (one, t), (1 - t, one), (zero, 1 - t))])
    data = _samples(inside, 2 * k * k * exact(inside), edge, torch.zeros(len(edge)), boundary_weight)
    objective = PointResiduals(TanhNetwork(widths), lambda slopes, laplacian: -laplacian)
    side = (torch.arange(101, dtype=torch.float64) / 100,) * 2
    return _problem(objective, data, _Truth(exact, *side, labels=("x", "y")))


def convection(
    widths: Sequence[int] = (50, 50, 50), points: int = 40, boundary_weight: float = 100.0, speed: float = 30.0
) -> Problem:
    """``u_t + βu_x = 0`` for x in [0, 2π], t in [0, 1], with u given at t = 0 and at the inflow x = 0; ``u = sin(x - βt)``.

    A wave that passes the domain several times, on which networks trained by first-order methods fail beyond β of about 10.

    Args:
        widths: Units of each hidden layer.
        points: The interior has ``points²`` of them on a regular grid, the boundary ``4 points``.
        boundary_weight: w on the boundary; 1 inside. About β² makes the two kinds of residual alike in size.
        speed: β.

    Source: Krishnapriyan et al., "Characterizing possible failure modes in physics-informed neural networks" (2021); there
    with periodic boundaries, here with inflow, which states the same solution.
    """
    _check(widths, points, boundary_weight)
    require_finite(1e-12, speed=speed)  # data are given at the inflow x = 0

    def exact(p: Tensor) -> Tensor:
        return torch.sin(2 * math.pi * p[:, 0] - speed * p[:, 1])

    # the network sees x / 2π, so that both inputs run from 0 to 1
    mid = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    inside = _grid(mid, mid)
    t = torch.arange(2 * points, dtype=torch.float64) / (2 * points - 1)
    edge = torch.cat([torch.stack((t, torch.zeros_like(t)), 1), torch.stack((torch.zeros_like(t), t), 1)])
    data = _samples(inside, torch.zeros(len(inside)), edge, exact(edge), boundary_weight)
    objective = PointResiduals(
        TanhNetwork(widths), lambda slopes, laplacian: slopes[1] + speed / (2 * math.pi) * slopes[0]
    )
    side = (torch.arange(201, dtype=torch.float64) / 200, torch.arange(101, dtype=torch.float64) / 100)
    return _problem(objective, data, _Truth(exact, *side, labels=("x / 2π", "t")))


@dataclasses.dataclass(frozen=True)
class _Truth:
    """The exact solution, and the grid on which it is compared and drawn."""

    exact: Callable[[Tensor], Tensor]
    first: Tensor
    second: Tensor
    labels: tuple[str, str]


def _problem(objective: PointResiduals, data: tuple[Tensor, ...], truth: _Truth) -> Problem:
    grid = _grid(truth.first, truth.second)
    expected = truth.exact(grid)

    def predicted() -> Tensor:
        with torch.no_grad():
            return objective.network(match_module(grid, objective.network)).double().cpu()

    def metrics(module: torch.nn.Module) -> dict[str, float]:
        error = torch.linalg.vector_norm(predicted() - expected) / torch.linalg.vector_norm(expected)
        return {"relative_l2_error": float(error)}

    def pictures(module: torch.nn.Module, folder: Path) -> list[Path]:
        shape = (len(truth.first), len(truth.second))
        u = predicted()
        return [_draw(u.view(shape), (u - expected).view(shape), truth, folder / "solution.png")]

    return Problem(objective, data, metrics=metrics, pictures=pictures, dtype="float64")


def _samples(inside: Tensor, f: Tensor, edge: Tensor, g: Tensor, boundary_weight: float) -> tuple[Tensor, ...]:
    boundary = torch.arange(len(inside) + len(edge)) >= len(inside)
    weights = torch.where(boundary, boundary_weight, 1.0).double()
    return torch.cat([inside, edge]), weights, torch.cat([f.double(), g.double()]), boundary


def _grid(first: Tensor, second: Tensor) -> Tensor:
    """All pairs, shape (len(first)·len(second), 2), float64."""
    return torch.cartesian_prod(first, second)


def _check(widths: Sequence[int], points: int, boundary_weight: float) -> None:
    if isinstance(widths, (int, str)) or not widths or any(not isinstance(w, int) or w < 1 for w in widths):
        raise UsageError(f"widths must be a list of hidden units such as [50,50,50], got {widths}")
    require_whole(2, points=points)
    require_finite(1e-12, boundary_weight=boundary_weight)


def _draw(u: Tensor, error: Tensor, truth: _Truth, path: Path) -> Path:
    """The solution beside its error."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    extent = tuple(float(v) for v in (truth.first[0], truth.first[-1], truth.second[0], truth.second[-1]))
    largest = float(np.abs(error.numpy()).max()) or 1.0
    for axis, values, title, colours, limit in zip(
        figure.subplots(1, 2),
        (u, error),
        ("solution u", f"error, at most {largest:.1e}"),
        ("viridis", "RdBu"),
        (None, largest),
        strict=True,
    ):
        image = axis.imshow(
            values.T.numpy(),
            origin="lower",
            extent=extent,
            aspect="auto",
            cmap=colours,
            vmin=None if limit is None else -limit,
            vmax=limit,
        )
        axis.set_xlabel(truth.labels[0])
        axis.set_ylabel(truth.labels[1])
        axis.set_title(title)
        figure.colorbar(image, ax=axis)
    path = path.with_suffix(f".{matplotlib.rcParams['savefig.format']}")
    figure.savefig(path, dpi=120)
    return path
