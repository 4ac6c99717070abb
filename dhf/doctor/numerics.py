"""Numbers against finite differences: gradient, Hessian and Gauss-Newton products, in float64 on a few samples.

    g·v  ~  (f(θ + hv) - f(θ - hv)) / 2h              H v  ~  (∇f(θ + hv) - ∇f(θ - hv)) / 2h
    vᵀG v  ~  (ℓ(z + εd) - 2ℓ(z) + ℓ(z - εd)) / ε²    with d = (z(θ + hv) - z(θ - hv)) / 2h

The smallest error over a few h counts: kinks, as of ReLU, spoil single ones.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dhf.comm import Serial
from dhf.coordinator import Coordinator
from dhf.doctor.conditions import as_in_a_run
from dhf.doctor.finding import ERROR, NOTE, Section, of_error
from dhf.objective import Objective
from dhf.operator import GaussNewton, GlobalOperator, Hessian, loss_and_gradient, loss_at
from dhf.parameters import Parameters

__all__ = ["compare_with_differences", "in_float64"]

_STEPS = (1e-4, 1e-5, 1e-6)  # h, for ‖v‖ = 1 and ‖θ‖ ~ 1
_WIDTHS = (1e-2, 1e-3, 1e-4)  # ε‖d‖
_TOLERANCE = 1e-4  # relative error of what differences confirm


def compare_with_differences(
    objective: Objective, make_batch: Callable[[torch.dtype], Any], curvature: str, seed: int
) -> Section:
    """Facts and findings on one rank's own; the module is in float64 meanwhile, and then as it was.

    Args:
        objective: What is looked at.
        make_batch: A few samples, their floating-point numbers in a dtype.
        curvature: ``"hessian"`` or one that is built on the Gauss-Newton matrix.
        seed: Fixes random numbers.
    """
    section = Section("numerics")
    with warnings.catch_warnings(), in_float64(objective.module):
        warnings.simplefilter("ignore")
        try:
            _Differences(section, objective, make_batch(torch.float64), curvature, seed).look()
        except Exception as error:
            found = of_error(error, "the objective in float64")
            section.find(
                NOTE,
                f"not compared with finite differences, which need float64: {found.what}",
                found.where,
                "let tensors that the objective holds follow the module's dtype, as buffers do",
            )
    return section


class _Differences:
    """The comparisons at one point, along one direction."""

    def __init__(self, section: Section, objective: Objective, batch: Any, curvature: str, seed: int) -> None:
        self._section, self._objective, self._batch, self._seed = section, objective, batch, seed
        self._hessian = curvature == "hessian"
        self._parameters = Parameters(objective.module)
        self._coordinator = Coordinator(Serial(self._parameters.device))
        self._theta = self._parameters.read()
        self._scale = max(1.0, float(torch.linalg.vector_norm(self._theta)))

    def look(self) -> None:
        """Compare everything, and tell it in the section."""
        with self._open(Hessian if self._hessian else GaussNewton) as A:
            g = A.gradient
            u = torch.randn(g.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(g)
            norm = float(torch.linalg.vector_norm(g))
            # along the gradient as well, so that its part in g·v is no accident
            v = u / torch.linalg.vector_norm(u) + (g / norm if norm else 0.0)
            v = v / torch.linalg.vector_norm(v)
            Av = A @ v
        try:
            slopes = [(self._loss(h * v) - self._loss(-h * v)) / (2 * h) for h in self._h()]
            self._judge("gradient", [abs(slope - float(g @ v)) / (norm or 1.0) for slope in slopes])
            if self._hessian:
                images = [(self._gradient(h * v) - self._gradient(-h * v)) / (2 * h) for h in self._h()]
                size = max(float(torch.linalg.vector_norm(Av)), 1e-12 * norm) or 1.0
                self._judge("Hessian product", [float(torch.linalg.vector_norm(image - Av)) / size for image in images])
            else:
                decay = self._objective.weight_decay
                forms = [self._form(h, width, v) + decay for h, width in zip(self._h(), _WIDTHS, strict=True)]
                size = max(abs(float(v @ Av)), 1e-12 * norm) or 1.0
                self._judge("Gauss-Newton product", [abs(form - float(v @ Av)) / size for form in forms])
        finally:
            self._parameters.write(self._theta)

    def _h(self) -> list[float]:
        return [h * self._scale for h in _STEPS]

    def _judge(self, label: str, errors: list[float]) -> None:
        error = min(errors)
        self._section.fact(label, f"relative error {error:.1e} against finite differences in float64")
        if not error <= _TOLERANCE:
            self._section.find(
                ERROR,
                f"the {label} differs from finite differences by {error:.1e} of itself",
                "outputs(batch) or loss(outputs, batch)",
                "look for detach(), .data, no_grad() or .item() on the way from parameters to the loss, and for an "
                "autograd.Function whose backward is wrong",
            )

    def _open(self, kind: Callable[..., GlobalOperator]) -> GlobalOperator:
        return kind(self._objective, [self._batch], coordinator=self._coordinator, seed=self._seed, retain="all")

    def _loss(self, step: Tensor) -> float:
        self._parameters.write(self._theta + step)
        return loss_at(self._theta + step, self._objective, [self._batch], self._coordinator, seed=self._seed)

    def _gradient(self, step: Tensor) -> Tensor:
        self._parameters.write(self._theta + step)
        return loss_and_gradient(self._objective, [self._batch], coordinator=self._coordinator, seed=self._seed)[1]

    def _outputs(self, step: Tensor) -> Tensor:
        self._parameters.write(self._theta + step)
        with as_in_a_run(self._objective, self._seed):
            return self._objective.outputs(self._batch).detach()

    def _form(self, h: float, width: float, v: Tensor) -> float:
        """``vᵀG v`` by values of outputs and loss alone."""
        z = self._outputs(torch.zeros_like(v))
        d = (self._outputs(h * v) - self._outputs(-h * v)) / (2 * h)
        eps = width / (float(torch.linalg.vector_norm(d)) or 1.0)
        up, at, down = (float(self._objective.loss(z + e * d, self._batch)) for e in (eps, 0.0, -eps))
        return (up - 2 * at + down) / eps**2


@contextlib.contextmanager
def in_float64(module: torch.nn.Module) -> Iterator[None]:
    """Parameters and buffers in float64 inside; the very tensors of before after."""
    held = [*module.parameters(), *module.buffers()]
    before = [t.data for t in held]
    for t in held:
        if t.is_floating_point():
            t.data = t.data.double() if t.dtype != torch.float64 else t.data.clone()
    try:
        yield
    finally:
        for t, data in zip(held, before, strict=True):
            t.data = data
