"""Burgers' equation by a network: residuals in float64, compared with the exact solution.

    python -m dhf.train --problem examples/burgers_pinn.py:build --steps 40
    torchrun --nproc_per_node=2 -m dhf.train --problem examples/burgers_pinn.py:build --options.viscosity 0.02

    u_t + u u_x = ν u_xx   for x in [-1, 1], t in [0, 1];   u(x, 0) = -sin(πx),   u(±1, t) = 0

A wave that steepens until the viscosity ν holds it. A sample is one point: inside, its residual is that of the equation; on the
edge, that of the value given there. Derivatives are taken by torch.func, which lets dhf's ``direct`` solver in, too.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.func import jvp

import dhf


class Burgers(dhf.LeastSquares):
    """The residuals at points; a batch is ``(points (N, 2), values (N,), inside (N,))``."""

    def __init__(self, module: torch.nn.Module, viscosity: float, edge_weight: float) -> None:
        super().__init__(module)
        self.viscosity, self.edge_weight = viscosity, edge_weight

    def outputs(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        points, values, inside = batch
        along_x, along_t = (torch.eye(2).to(points)[i].expand_as(points) for i in (0, 1))

        def value(p: Tensor) -> Tensor:
            return self.module(p)[:, 0]

        def value_and_slope(p: Tensor) -> tuple[Tensor, Tensor]:
            return jvp(value, (p,), (along_x,))

        (u, u_x), (_, u_xx) = jvp(value_and_slope, (points,), (along_x,))
        _, u_t = jvp(value, (points,), (along_t,))
        equation = u_t + u * u_x - self.viscosity * u_xx
        return torch.where(inside, equation, math.sqrt(self.edge_weight) * (u - values))


def build(viscosity: float = 0.05, width: int = 20, points: int = 24, edge_weight: float = 10.0) -> dhf.Problem:
    """The problem.

    Args:
        viscosity: ν; the smaller, the steeper the wave.
        width: Units of each of two hidden layers.
        points: Along each direction, inside.
        edge_weight: What a point of the edge counts against one inside.
    """
    module = torch.nn.Sequential(
        torch.nn.Linear(2, width),
        torch.nn.Tanh(),
        torch.nn.Linear(width, width),
        torch.nn.Tanh(),
        torch.nn.Linear(width, 1),
    )
    x, t = np.linspace(-1, 1, 101), np.linspace(0, 1, 21)[1:]
    grid = torch.cartesian_prod(torch.from_numpy(x), torch.from_numpy(t))
    exact = torch.from_numpy(cole_hopf(x, t, viscosity)).flatten()

    def metrics(module: torch.nn.Module) -> dict[str, float]:
        weight = next(module.parameters())
        with torch.no_grad():
            error = module(grid.to(weight))[:, 0].double().cpu() - exact
        return {"relative_l2_error": float(error.norm() / exact.norm())}

    return dhf.Problem(Burgers(module, viscosity, edge_weight), samples(points), metrics=metrics, dtype="float64")


def samples(points: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points inside on a grid of ``points²``, and on the edge ``2 points`` each at t = 0 and at x = ±1; float64."""
    middles = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    within = torch.cartesian_prod(2 * middles - 1, middles)
    x, t = torch.linspace(-1, 1, 2 * points, dtype=torch.float64), torch.linspace(0, 1, points, dtype=torch.float64)
    start = torch.stack([x, torch.zeros_like(x)], 1)
    sides = torch.cat([torch.stack([torch.full_like(t, side), t], 1) for side in (-1.0, 1.0)])
    values = torch.cat([torch.zeros(len(within)).double(), -torch.sin(math.pi * x), torch.zeros(len(sides)).double()])
    return torch.cat([within, start, sides]), values, torch.arange(len(values)) < len(within)


def cole_hopf(x: np.ndarray, t: np.ndarray, viscosity: float) -> np.ndarray:
    """The exact solution for all pairs of x and t > 0, shape (len(x), len(t)), float64.

        u = -∫ sin(πy) w dη / ∫ w dη,   y = x - 2√(νt) η,   w = exp(-η² - cos(πy) / 2πν)

    by Gauss-Hermite quadrature. Source: Cole (1951); Basdevant et al. (1986).
    """
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    y = x[:, None, None] - 2 * np.sqrt(viscosity * t)[None, :, None] * nodes
    exponent = -np.cos(np.pi * y) / (2 * np.pi * viscosity)
    w = weights * np.exp(exponent - exponent.max(-1, keepdims=True))  # a common factor, against overflow
    return -(np.sin(np.pi * y) * w).sum(-1) / w.sum(-1)
