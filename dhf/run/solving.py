"""solve_at: one linear system at a problem's point: ``(A + damping I) x = b``, with the objective's gradient or a file's b."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dhf.coordinator import Coordinator
from dhf.errors import UsageError
from dhf.operator import Fisher, GaussNewton, GlobalOperator, Hessian, NormalMatrix, ResidualJacobian
from dhf.optim import HessianFree
from dhf.optim.choices import choose_vectors, make_preconditioner, name_of
from dhf.optim.linearisation import Dense
from dhf.run.point import Point
from dhf.run.saver import share
from dhf.solvers import Solution, cg, cgls, direct, minres
from dhf.solvers.solution import Iteration

__all__ = ["GRADIENT", "Solved", "System", "open_operator", "patterns", "solve_at", "tensor_bytes"]

GRADIENT = "gradient"
_MATRICES = {"hessian": Hessian, "ggn": GaussNewton, "fisher": Fisher}


@dataclasses.dataclass(frozen=True, slots=True)
class System:
    """What is solved, and how.

    Attributes:
        curvature: ``"ggn"``, ``"hessian"`` or ``"fisher"``.
        damping: Added to the diagonal.
        solver: ``"cg"``, ``"minres"``, ``"cgls"`` or ``"direct"``.
        rhs: ``"gradient"``, or a .pt or .npy file with b, shape (n,), which only rank 0 need see.
        rtol: Relative residual at which to stop.
        max_iterations: Most iterations, or None for ten times the parameters.
        parameters: Patterns of the names that the matrix is taken in, or None for all.
    """

    curvature: str
    damping: float
    solver: str
    rhs: str
    rtol: float
    max_iterations: int | None
    parameters: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Solved:
    """A solution with the system it belongs to.

    Attributes:
        solution: Its x is whole on every rank, shape (n,), and solves for +b.
        loss, gradient_norm: The objective's.
        b_norm: ‖b‖.
        preconditioner: Its name.
        products: Taken by the solve, its preconditioner included.
        seconds: That these took.
        parameters: Name and shape of each tensor that x is made of, in its order.
    """

    solution: Solution
    loss: float
    gradient_norm: float
    b_norm: float
    preconditioner: str
    products: int
    seconds: float
    parameters: list[tuple[str, tuple[int, ...]]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, the solution's tensors left out."""
        s, scale = self.solution, self.b_norm or 1.0
        return {
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
            "rhs_norm": self.b_norm,
            "preconditioner": self.preconditioner,
            "reason": s.reason.name,
            "advice": s.reason.advice,
            "converged": s.converged,
            "iterations": s.iterations,
            "residual_norm": s.residual_norm,
            "true_residual_norm": s.true_residual_norm,
            "relative_residual": s.residual_norm / scale,
            "relative_true_residual": s.true_residual_norm / scale,
            "model": s.model,
            "solution_norm": float(torch.linalg.vector_norm(s.x.double())),
            "products": self.products,
            "seconds": self.seconds,
        }


def open_operator(
    point: Point, curvature: str, coordinator: Coordinator, parameters: str | None = None, *, build: Any = None
) -> GlobalOperator:
    """The matrix of the point's objective; a context manager. Collective.

    Args:
        point: Where.
        curvature: ``"ggn"``, ``"hessian"`` or ``"fisher"``.
        coordinator: How ranks agree.
        parameters: Patterns of the names that it is taken in, with commas between; None for all.
        build: Another kind of operator, such as ResidualJacobian.
    """
    config, optimizer = point.config, point.parts.optimizer
    vectors: str = config.vectors or "replicated"
    if vectors == "auto" and isinstance(optimizer, HessianFree):
        vectors, _ = choose_vectors(optimizer.settings, optimizer.parameters, coordinator.comm)
    batches = coordinator.attempt(lambda: point.train.batches(0))
    return (build or _MATRICES[curvature])(
        point.objective,
        batches,
        coordinator=coordinator,
        seed=config.seed,
        vectors=vectors,
        retain="auto" if config.retain is None else config.retain,
        products=config.products or "auto",
        debug_nonfinite=config.debug_nonfinite,
        parameters=patterns(parameters),
    )


def patterns(text: str | None) -> list[str] | None:
    """The patterns in a flag, with commas between."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def solve_at(
    point: Point, system: System, coordinator: Coordinator, callback: Callable[[Iteration, float], None] | None = None
) -> Solved:
    """Solve it, over all ranks.

    Args:
        point: The problem, and where.
        system: What is solved, and how.
        coordinator: How ranks agree.
        callback: Called with each iteration and ‖b‖.

    Raises:
        UsageError: If the solver does not go with the problem or the right-hand side, or the file cannot be used.
    """
    if system.rhs != GRADIENT and system.solver == "cgls":
        raise UsageError("--solver cgls solves for the objective's own residuals; for another --rhs use cg or minres")
    build = ResidualJacobian if system.solver == "cgls" else None
    with open_operator(point, system.curvature, coordinator, system.parameters, build=build) as A:
        b = A.gradient if system.rhs == GRADIENT else A.space.piece(_read(system.rhs, A, coordinator))
        gg, bb = A.space.dots((A.gradient, A.gradient), (b, b))
        note = None if callback is None else functools.partial(_with_norm, callback, math.sqrt(bb))
        before, began = A.products, time.perf_counter()
        solution, preconditioner = _solve(point, system, A, b, note)
        seconds = time.perf_counter() - began
        x = solution.x if system.solver == "direct" else A.space.whole(solution.x)
        return Solved(
            dataclasses.replace(solution, x=x),
            A.loss,
            math.sqrt(gg),
            math.sqrt(bb),
            preconditioner,
            A.products - before,
            seconds,
            [(name, tuple(p.shape)) for name, p in zip(A.parameters.names, A.parameters.tensors, strict=True)],
        )


def _solve(
    point: Point, system: System, A: GlobalOperator, b: Tensor, note: Callable[[Iteration], None] | None
) -> tuple[Solution, str]:
    """The solution, and the name of the preconditioner."""
    optimizer = point.parts.optimizer
    assert isinstance(optimizer, HessianFree)
    if system.solver == "direct":
        return _direct(system, A, b), "none"
    make = make_preconditioner(optimizer.settings, point.config.seed)
    options: dict[str, Any] = {
        "rtol": system.rtol,
        "max_iterations": system.max_iterations,
        "preconditioner": None if make is None else make(A, system.damping),
        "callback": note,
    }
    if system.solver == "cgls":
        found = cgls(A, damping=system.damping, **options)
        found = dataclasses.replace(found, x=-found.x)  # its right-hand side is minus the gradient
    else:
        found = (minres if system.solver == "minres" else cg)(A.shifted(system.damping), b, **options)
    return found, name_of(optimizer.settings.preconditioner)


def _direct(system: System, A: GlobalOperator, b: Tensor) -> Solution:
    if A.in_pieces:
        raise UsageError("--solver direct holds a dense matrix on every rank; leave --vectors out, or use cg")
    dense = Dense.of(A)
    if system.rhs == GRADIENT:
        solution = direct(NormalMatrix(A, in_samples=dense.in_samples), damping=system.damping)
        return dataclasses.replace(solution, x=-solution.x)
    matrix = NormalMatrix(A, in_samples=False)
    return direct(matrix.matrix, b, damping=system.damping + matrix.shift)


def _read(path: str, A: GlobalOperator, coordinator: Coordinator) -> Tensor:
    """The right-hand side in a file, read by rank 0 for all."""
    n = A.shape[0]
    found = coordinator.attempt(lambda: _file(Path(path), n) if coordinator.comm.rank == 0 else None)
    content = None if found is None else found.double().numpy().tobytes()
    vector = torch.frombuffer(bytearray(share(coordinator.comm, content)), dtype=torch.float64)
    return vector.to(A.device, A.dtype)


def _file(path: Path, n: int) -> Tensor:
    if path.suffix not in (".pt", ".npy"):
        raise UsageError(f"--rhs {path} must be {GRADIENT}, or a .pt or .npy file with a vector of {n:,} numbers")
    try:
        if path.suffix == ".npy":
            found: Any = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(f"--rhs {path} cannot be read: {type(error).__name__}: {str(error).splitlines()[0]}") from None
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.numel() != n or found.dim() != 1:
        what = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise UsageError(
            f"--rhs {path} must hold floating-point numbers of shape ({n},), one per parameter, got {what}"
        )
    if not bool(torch.isfinite(found).all()):
        raise UsageError(f"--rhs {path} holds NaN or infinity; mend it")
    return found.detach()


def tensor_bytes(path: Path, x: Tensor) -> bytes:
    """A tensor as the content of a .pt or .npy file."""
    buffer = io.BytesIO()
    if path.suffix == ".npy":
        np.save(buffer, x.cpu().numpy())
    else:
        torch.save(x.cpu(), buffer)
    return buffer.getvalue()


def _with_norm(callback: Callable[[Iteration, float], None], norm: float, iteration: Iteration) -> None:
    callback(iteration, norm)
