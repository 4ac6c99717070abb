"""Linearisation: the part of a step that needs graphs: loss, gradient, curvature and solve at one θ; no graph outlives it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dhf.coordinator import Coordinator
from dhf.curvature import FisherGraph, GaussNewtonGraph, GradientGraph, HessianGraph, NonFinite, Retention
from dhf.curvature.shard import BuildGraph
from dhf.curvature.traced import graph_builder
from dhf.errors import NonFiniteError
from dhf.evaluation import moving_buffers
from dhf.objective import Objective, rows, select
from dhf.operator import GlobalOperator, NormalMatrix, ResidualJacobian
from dhf.optim.settings import Settings
from dhf.parameters import Parameters
from dhf.reason import Reason
from dhf.solvers import Direct, Iteration, Solution, cg, cgls, minres, steihaug
from dhf.vector_space import VectorSpace

__all__ = ["ROWS_COST", "Bounds", "Dense", "Linearisation", "MakePreconditioner", "OnIteration", "Precondition"]

Precondition = Callable[[Tensor], Tensor]
MakePreconditioner = Callable[[GlobalOperator, float], Precondition]
OnIteration = Callable[[Iteration, float], None]

_DENSE_BYTES = 2 * 2**30  # most that a dense matrix and its rows may take on a rank
_DENSE_SPEED = 4.0  # multiplications in large matrix products are so much faster than in a network's gradient
_LOOSE = 0.1  # relative residual from which on a solve need not take its true one
ROWS_COST = 5.0  # gradients that all rows of a Jacobian cost by one vectorised call


@dataclasses.dataclass(frozen=True, slots=True)
class Bounds:
    """What keeps a solve in reach, and where it starts.

    Attributes:
        damping: λ.
        radius: Of the trust region, or None.
        rtol: Relative residual at which it stops.
        start: Where it starts, or None for zero.
    """

    damping: float
    radius: float | None
    rtol: float
    start: Tensor | None


class Linearisation:
    """One step's quadratic model.

    Args:
        objective: What is minimised.
        coordinator: How ranks agree.
        settings: Solver, preconditioner and their numbers; ``solver`` is decided.
        shard: This rank's micro-batches.
        seed: Fixes dropout and other randomness for the step.
        precondition: Makes the preconditioner, or None.
        debug_nonfinite: Whether to search for the sample where a product is not finite.
        verify: Whether a direct solver compares single samples with their batch.
        tell: Called with a sentence where products are taken in another way than asked for; warns by default.
        retention: Which graphs are kept.
        on_iteration: Called with each Iteration of an iterative solver, and the norm of its right-hand side.

    Attributes:
        theta: The parameters, shape (n,).
        loss, gradient, gradient_norm: The global objective's, there; known after :meth:`solve`.
        space: How gradient and solutions are stored.
        products: Curvature products taken.
        micro_batches, retained: Those of all ranks in the solve, and those of them whose graphs were kept to its end.
        solve_again: Solves the same model with another damping, where that needs no graph; None otherwise.
    """

    loss: float
    gradient: Tensor
    gradient_norm: float
    space: VectorSpace

    def __init__(
        self,
        objective: Objective,
        parameters: Parameters,
        coordinator: Coordinator,
        settings: Settings,
        shard: Sequence[Any],
        seed: int,
        *,
        precondition: MakePreconditioner | None,
        debug_nonfinite: bool = False,
        verify: bool = True,
        tell: Callable[[str], None] | None = None,
        retention: Retention | None = None,
        on_iteration: OnIteration | None = None,
    ) -> None:
        self.objective, self.parameters, self.coordinator = objective, parameters, coordinator
        self.settings, self.shard, self.seed = settings, shard, seed
        self._precondition, self._debug, self._verify = precondition, debug_nonfinite, verify
        self._tell, self._on_iteration = tell, on_iteration
        self.theta = parameters.read()
        self._retention = retention or Retention()
        self.products = self.micro_batches = self.retained = 0
        self.non_finite: dict[int, NonFinite | None] = {}
        self.solve_again: Callable[[float], Solution] | None = None

    def solve(self, bounds: Callable[[float], Bounds]) -> Solution | None:
        """The model's minimiser within bounds, which are told the gradient norm; None at a stationary point."""
        full = self.settings.curvature_fraction == 1.0
        with self._open(self._graph() if full else GradientGraph, self.shard, move_buffers=True) as at:
            self.loss, self.gradient, self.space = at.loss, at.gradient, at.space
            self.gradient_norm = math.sqrt(at.space.dots((at.gradient, at.gradient))[0])
            _average_buffers(self.objective, at)
            if self.gradient_norm == 0:
                return None
            within = bounds(self.gradient_norm)
            if full:
                return self._solve_on(at, within)
            chosen = _subsample(
                self.shard, at.rows, self.coordinator.comm.rank, self.settings.curvature_fraction, self.seed
            )
        with self._open(self._graph(), chosen) as curvature:
            return self._solve_on(curvature, within)

    def _solve_on(self, operator: GlobalOperator, within: Bounds) -> Solution:
        solver = self.settings.solver
        if solver == "direct":
            with self.coordinator.phases("dense"):
                dense = Direct(NormalMatrix(operator, in_samples=_in_samples(operator), verify=self._verify))
            self.solve_again = self.coordinator.phases.timed("dense", dense.solve)
            return self.solve_again(within.damping)
        options: dict[str, Any] = {
            "rtol": within.rtol,
            "max_iterations": self.settings.cg_max_iterations,
            # a trust region's boundary acts like a damping of about ‖g‖ / radius
            "preconditioner": self._make_preconditioner(
                operator, within.damping if within.radius is None else self.gradient_norm / within.radius
            ),
            "snapshot_ratio": 1.3,
            "callback": self._callback,
        }
        if solver != "minres" and solver != "steihaug":
            options["progress_tolerance"] = self.settings.cg_progress_tolerance
        start = None if within.start is None else operator.space.piece(within.start)
        if solver == "steihaug":
            assert within.radius is not None
            solution = steihaug(operator, -self.gradient, radius=within.radius, **options)
        elif solver == "cgls":
            solution = cgls(operator, damping=within.damping, x0=start, **options)
        else:
            solve = minres if solver == "minres" else cg
            if solver == "cg":
                options["true_residual"] = within.rtol < _LOOSE
            rounded = self.settings.reduce_dtype != "full" and operator.comm.size > 1
            shifted = operator.compressed(within.damping) if rounded else operator.shifted(within.damping)
            solution = solve(shifted, -self.gradient, x0=start, **options)
        self.products = operator.products
        self.micro_batches, self.retained = operator.micro_batches, operator.retained
        if solution.reason is Reason.NON_FINITE:
            self.non_finite = operator.non_finite
        return solution

    def _make_preconditioner(self, operator: GlobalOperator, damping: float) -> Precondition | None:
        if self._precondition is None:
            return None
        phases = self.coordinator.phases
        # a probe that is not finite is so on every rank; the solve goes on without, and meets the same trouble or not
        with contextlib.suppress(NonFiniteError), phases("preconditioner"):
            return phases.timed("preconditioner", self._precondition(operator, damping))
        return None

    @property
    def _callback(self) -> Callable[[Iteration], None] | None:
        tell = self._on_iteration
        return None if tell is None else lambda iteration: tell(iteration, self.gradient_norm)

    def _open(self, build: BuildGraph, shard: Sequence[Any], *, move_buffers: bool = False) -> GlobalOperator:
        options: dict[str, Any] = {
            "seed": self.seed,
            "coordinator": self.coordinator,
            "move_buffers": move_buffers,
            "debug_nonfinite": self._debug,
            "vectors": self.settings.vectors,
            "bucket_bytes": int(self.settings.bucket_mb * 1e6) or None,
            "retain": self._retention,
        }
        if self.settings.solver == "cgls" and build is not GradientGraph:
            return ResidualJacobian(self.objective, shard, build=build, **options)
        return GlobalOperator(self.objective, shard, build=build, **options)

    def _graph(self) -> BuildGraph:
        if self.settings.solver == "direct":
            return GradientGraph
        kind = HessianGraph if self.settings.curvature == "hessian" else GaussNewtonGraph
        build = graph_builder(kind, self.settings.products, self._tell)
        if self.settings.curvature == "fisher":
            return functools.partial(FisherGraph, seed=self.seed, gauss_newton=build)
        return build


@dataclasses.dataclass(frozen=True, slots=True)
class Dense:
    """What a direct solve of an operator's system would take.

    Attributes:
        size: Rows of the matrix.
        in_samples: Whether it is formed in sample space.
        memory: Bytes on every rank.
        operations: Multiplications and additions of a step, in the time that a network's gradient takes for one.
        gradient: The same of one gradient.
    """

    size: int
    in_samples: bool
    memory: int
    operations: float
    gradient: float

    @staticmethod
    def of(operator: GlobalOperator) -> Dense:
        """By the operator's sizes; collective nowhere."""
        n, m, in_samples = operator.shape[0], _residuals(operator), _in_samples(operator)
        k = m if in_samples else n
        width = torch.finfo(operator.dtype).bits // 8
        gradient = 6.0 * n * sum(operator.rows)
        operations = ROWS_COST * gradient + (2.0 * m * n * k + k**3 / 3) / _DENSE_SPEED
        return Dense(k, in_samples, width * (3 * k * k + (2 * m * n if in_samples else 0)), operations, gradient)

    def is_cheaper(self, iterations: int) -> bool:
        """Whether memory allows it and it takes fewer operations than half of so many iterations, the number expected."""
        return self.memory <= _DENSE_BYTES and self.operations <= 0.5 * iterations * 1.3 * self.gradient

    def __str__(self) -> str:
        space = "sample" if self.in_samples else "parameter"
        return f"a {self.size:,} x {self.size:,} matrix in {space} space"


def _in_samples(operator: GlobalOperator) -> bool:
    return operator.objective.is_least_squares and _residuals(operator) < operator.shape[0]


def _residuals(operator: GlobalOperator) -> int:
    return operator.outputs_per_row * sum(operator.rows)


def _subsample(shard: Sequence[Any], sizes: Sequence[int], rank: int, fraction: float, seed: int) -> list[Any]:
    """This rank's part of a sub-sample of all data, drawn alike on every rank from the samples' global order."""
    total = sum(sizes)
    generator = np.random.default_rng(seed)
    chosen = np.sort(generator.choice(total, max(1, round(fraction * total)), replace=False))
    first = sum(sizes[:rank])
    picked = []
    for batch in shard:
        size = rows(batch)
        inside = chosen[(chosen >= first) & (chosen < first + size)] - first
        if len(inside):
            picked.append(select(batch, torch.from_numpy(inside)))
        first += size
    return picked


def _average_buffers(objective: Objective, at: GlobalOperator) -> None:
    """Give all ranks the sample-weighted mean of the running statistics that this step's forward pass has moved."""
    comm = at.comm
    buffers = moving_buffers(objective.module)
    if comm.size == 1 or not buffers:
        return
    weight = at.rows[comm.rank] / sum(at.rows)
    flat = torch.cat([b.detach().double().reshape(-1) * weight for b in buffers])
    at.coordinator.all_reduce(flat)
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.data.copy_(mean.view_as(buffer).round() if not buffer.is_floating_point() else mean.view_as(buffer))
