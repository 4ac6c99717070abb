"""A trial on all ranks, in the run's own dtype: is the matrix symmetric, and does a solve reach the tolerance asked for?"""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from dhf.coordinator import Coordinator
from dhf.doctor.finding import ERROR, NOTE, WARNING, Section
from dhf.objective import Objective
from dhf.operator import Fisher, GaussNewton, GlobalOperator, Hessian
from dhf.optim.settings import Settings
from dhf.reason import Reason
from dhf.solvers import Solution, cg, minres

__all__ = ["MATRICES", "try_solve"]

MATRICES: dict[str, Any] = {"hessian": Hessian, "ggn": GaussNewton, "fisher": Fisher}
_SECONDS = 5.0  # that the trial solve may take, about
_LEAST, _MOST = 10, 200  # iterations
_TURNS = 3


def try_solve(
    objective: Objective, batches: list[Any], settings: Settings, coordinator: Coordinator, seed: int
) -> Section:
    """Symmetry, and one solve, on a micro-batch of each rank. Collective.

    Args:
        objective: What is looked at.
        batches: This rank's samples for it.
        settings: Those that a run would start with.
        coordinator: How ranks agree.
        seed: Fixes random numbers.
    """
    section = Section("a trial solve")
    make = MATRICES[settings.curvature]
    with make(objective, batches, coordinator=coordinator, seed=seed, retain=settings.retain) as A:
        seconds = _symmetry(section, A, settings.curvature)
        limit = max(_LEAST, min(_MOST, settings.cg_max_iterations, int(_SECONDS / seconds)))
        solver = minres if settings.curvature == "hessian" else cg
        if not any(A.space.dots((A.gradient, A.gradient))):
            section.fact("solve", "none: the gradient is zero")
            return section
        solution = solver(A.shifted(settings.damping), A.gradient, rtol=settings.cg_rtol, max_iterations=limit)
        size = math.sqrt(A.space.dots((A.gradient, A.gradient))[0])
    _judge(section, solution, size, settings, A.dtype, solver.__name__)
    return section


def _symmetry(section: Section, A: GlobalOperator, curvature: str) -> float:
    """``⟨u, A v⟩`` against ``⟨v, A u⟩``; the seconds of a product, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(_TURNS):
        u, v = torch.randn(2, A.shape[0], generator=generator, dtype=torch.float64).to(A.device, A.dtype)
        began = time.perf_counter()
        Au, Av = A @ u, A @ v
        seconds = (time.perf_counter() - began) / 2
        uAv, vAu, uu, AvAv = A.space.dots((u, Av), (v, Au), (u, u), (Av, Av))
        pairs.append(abs(uAv - vAu) / (math.sqrt(uu * AvAv) or 1.0))
    error, bound = max(pairs), 100 * torch.finfo(A.dtype).eps * math.sqrt(A.shape[0])
    section.fact("symmetry", f"<u, A v> and <v, A u> differ by {error:.1e} of |u| |A v|")
    if not error <= max(bound, 1e-3 if A.dtype == torch.float32 else 0.0):
        section.find(
            ERROR,
            f"the {curvature} matrix is not symmetric: <u, A v> and <v, A u> differ by {error:.1e} of |u| |A v|",
            "outputs(batch) or loss(outputs, batch)",
            "look for an autograd.Function whose backward is wrong, and for operations that are not deterministic",
        )
    return max(A.comm.gather_objects(max(seconds, 1e-6)))


def _judge(
    section: Section, solution: Solution, size: float, settings: Settings, dtype: torch.dtype, solver: str
) -> None:
    """Whether the tolerance was reached, or can be."""
    true = solution.true_residual_norm / size
    section.fact(
        "solve",
        f"{solver} with damping {settings.damping:g} to a residual of {settings.cg_rtol:g}: {solution.reason.words} after "
        f"{solution.iterations} iterations, true residual {true:.1e}",
    )
    asked, eps = settings.cg_rtol, torch.finfo(dtype).eps
    name = str(dtype).removeprefix("torch.")
    better = "--dtype float64, or " if dtype == torch.float32 else ""
    if solution.reason is Reason.ACCURACY_LOST:
        section.find(
            WARNING,
            f"{name} cannot reach the tolerance {asked:g}: the true residual stays at {true:.1e}",
            "--cg-rtol",
            f"{better}--cg-rtol {_rounded_up(2 * true):.0e}",
        )
    elif 0 < asked < eps:
        section.find(
            WARNING,
            f"{name} cannot reach the tolerance {asked:g}: it rounds at {eps:.0e}, times the condition number",
            "--cg-rtol",
            f"{better}--cg-rtol {_rounded_up(100 * eps):.0e}",
        )
    elif solution.reason is Reason.NOT_SYMMETRIC:
        section.find(ERROR, solution.reason.advice, "outputs(batch) or loss(outputs, batch)", "see symmetry, above")
    elif solution.reason is Reason.NEGATIVE_CURVATURE:
        section.find(NOTE, "the matrix has negative curvature here", "--curvature", "more --damping, ggn, or minres")


def _rounded_up(value: float) -> float:
    """The next number with one digit."""
    if not 0 < value < 1:
        return 0.9
    power = 10.0 ** math.floor(math.log10(value))
    return math.ceil(value / power - 1e-9) * power
