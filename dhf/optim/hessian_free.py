"""HessianFree: a torch optimizer whose step is a damped Newton or Gauss-Newton solve by conjugate gradients.

One step, at parameters θ:

    1. gradient g and curvature B on graphs built once           (one pass over the data)
    2. (B + λI) d = -g by CG, warm-started                        (one product and one collective per iteration)
    3. the graphs are freed; only then do parameters move
    4. d among CG's iterates, then a step length s, by the objective itself
    5. λ from the reduction ratio (f(θ + d) - f(θ)) / (gᵀd + ½dᵀBd)

Every number that decides anything is a sum over ranks, or rank 0's, so that all ranks take the same step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dhf.comm import Communicator, Serial
from dhf.coordinator import Coordinator, capture
from dhf.curvature import FisherGraph, GaussNewtonGraph, GradientGraph, HessianGraph, NonFinite
from dhf.curvature.shard import BuildGraph
from dhf.errors import NonFiniteError, UsageError
from dhf.evaluation import moving_buffers, stream_seed
from dhf.objective import Objective, require_objective, rows, select
from dhf.operator import GlobalOperator
from dhf.optim.damping import LevenbergMarquardt, reduction_ratio
from dhf.optim.report import StepReport
from dhf.optim.trial import Point, Trial
from dhf.parameters import Parameters
from dhf.preconditioners import jacobi
from dhf.reason import Reason
from dhf.solvers import Iterate, Solution, cg

__all__ = ["CURVATURES", "PRECONDITIONERS", "SOLVERS", "HessianFree"]

CURVATURES = ("ggn", "hessian", "fisher")
PRECONDITIONERS = ("auto", "none", "jacobi")
SOLVERS = ("cg",)

Precondition = Callable[[Tensor], Tensor]
MakePreconditioner = Callable[[GlobalOperator, float], Precondition]

_NOT_TAKEN = (Reason.INTERRUPTED, Reason.TIME_LIMIT)


class HessianFree(torch.optim.Optimizer):
    """Distributed Hessian-free optimisation (truncated Newton, Gauss-Newton or natural gradient by CG).

    Args:
        objective: What is minimised; its module's trainable parameters are what moves.
        comm: How ranks talk; one process by default.
        curvature: ``"ggn"`` (generalised Gauss-Newton), ``"hessian"`` or ``"fisher"`` (sampled labels).
        preconditioner: ``"none"``, ``"jacobi"``, or a function of (operator, damping) that returns ``r -> z``. ``"auto"`` is
            ``"none"``: a diagonal has not paid for itself on the problems measured.
        solver: ``"cg"``.
        damping: First λ of ``(B + λI) d = -g``; it adapts.
        cg_max_iterations: Most CG iterations per step.
        cg_rtol: Relative residual at which CG stops.
        cg_progress_tolerance: Martens' relative-progress rule; None turns it off.
        warm_start_decay: CG starts at this multiple of the last solution; 0 starts at zero.
        curvature_fraction: Share of the samples that curvature is taken on, in (0, 1]; which samples depends on the seed,
            the step and the samples' order over ranks, not on how many ranks there are.
        seed: Names the random streams (dropout masks, sampled labels, sub-samples, probes); the same on all ranks.
        debug_nonfinite: Whether to search for the sample where a loss, gradient or product is not finite.
        coordinator: How ranks agree; made from ``comm`` by default.

    Raises:
        UsageError: If an argument or the module cannot be used.

    Example:
        >>> import torch
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch...>
        >>> x = torch.randn(20, 3, dtype=torch.float64)
        >>> objective = Objective(torch.nn.Linear(3, 1).double(), torch.nn.MSELoss())
        >>> optimizer = HessianFree(objective, damping=1e-6)
        >>> report = optimizer.step([(x, x.sum(1, keepdim=True) + 1)])
        >>> report.reason.name, report.loss_after < 1e-9
        ('STEP_ACCEPTED', True)

    Source: Martens (2010), "Deep learning via Hessian-free optimization"; Martens & Sutskever (2012). Deviations: the reduction
    ratio is of the undamped model, as in Levenberg-Marquardt; backtracking looks at iterates from the last one down.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        comm: Communicator | None = None,
        curvature: str = "ggn",
        preconditioner: str | MakePreconditioner = "auto",
        solver: str = "cg",
        damping: float = 1.0,
        cg_max_iterations: int = 250,
        cg_rtol: float = 1e-8,
        cg_progress_tolerance: float | None = 5e-4,
        warm_start_decay: float = 0.95,
        curvature_fraction: float = 1.0,
        seed: int = 0,
        debug_nonfinite: bool = False,
        coordinator: Coordinator | None = None,
    ) -> None:
        _check_choice("curvature", curvature, CURVATURES)
        _check_choice("solver", solver, SOLVERS)
        if not callable(preconditioner):
            _check_choice("preconditioner", preconditioner, PRECONDITIONERS)
        if not 0 < curvature_fraction <= 1:
            raise UsageError(f"curvature_fraction must be in (0, 1], got {curvature_fraction}")
        if not 0 <= warm_start_decay <= 1:
            raise UsageError(f"warm_start_decay must be in [0, 1], got {warm_start_decay}")
        if cg_max_iterations < 1:
            raise UsageError(f"cg_max_iterations must be at least 1, got {cg_max_iterations}")
        if not damping > 0:
            raise UsageError(f"damping must be positive, got {damping}")
        require_objective(objective)
        self.objective = objective
        self.parameters = Parameters(objective.module)
        comm = comm if comm is not None else coordinator.comm if coordinator else Serial(self.parameters.device)
        self.comm = comm
        self.coordinator = coordinator or Coordinator(comm)
        self.curvature, self.preconditioner = curvature, preconditioner
        self._solve_options: dict[str, Any] = {
            "max_iterations": cg_max_iterations,
            "rtol": cg_rtol,
            "progress_tolerance": cg_progress_tolerance,
            "snapshot_ratio": 1.3,
        }
        self._damping = LevenbergMarquardt(damping)
        self._decay, self._fraction, self._seed = warm_start_decay, curvature_fraction, seed
        self._debug_nonfinite = debug_nonfinite
        self._steps = 0
        self._last: Tensor | None = None
        self._eps = torch.finfo(self.parameters.dtype).eps
        super().__init__(self.parameters.tensors, {})

    @property
    def damping(self) -> float:
        """The λ of the next step."""
        return self._damping.damping

    def step(self, batches: Iterable[Any]) -> StepReport:  # type: ignore[override]
        """Take one step on this rank's micro-batches; every rank calls it together.

        A step that finds no decrease leaves the parameters as they were, raises the damping, and reports NO_DECREASE. A step
        during which the coordinator learns of a stop signal or the time limit is not taken: nothing has changed then.

        Args:
            batches: This rank's micro-batches, each what ``objective.outputs`` takes; none for an empty shard.

        Raises:
            UsageError, RanksDifferError, NonFiniteError, RankError, ReplicasDivergedError, CommunicationError: On every
                rank alike; the parameters are then as they were.
        """
        began, waited = time.perf_counter(), self.coordinator.seconds_waiting
        shard, failure = capture(lambda: list(batches))
        self.coordinator.require_same(self._facts(), failure=failure)
        assert shard is not None
        buffers = moving_buffers(self.objective.module)
        kept = [b.clone() for b in buffers]
        try:
            report = self._step_on(shard)
        except BaseException:
            _restore(buffers, kept)
            raise
        if report.reason in _NOT_TAKEN:
            _restore(buffers, kept)
        else:
            self._steps += 1
        seconds, waiting = time.perf_counter() - began, self.coordinator.seconds_waiting - waited
        return dataclasses.replace(report, seconds=seconds, seconds_waiting=waiting)

    def _step_on(self, shard: Sequence[Any]) -> StepReport:
        work = _Step(self, shard, stream_seed(self._seed, self._steps))
        solve = work.solve()
        if solve is None:
            return work.report(Reason.GRADIENT_ZERO, None, 0.0, work.loss, math.nan)
        if solve.reason in _NOT_TAKEN:
            # a resumed run takes this step again, and so goes the way of a run that was never stopped
            return work.report(solve.reason, solve, 0.0, work.loss, math.nan)
        return self._move(work, solve)

    def _move(self, work: _Step, solve: Solution) -> StepReport:
        damping = self.damping
        trial = Trial(work.point(), damping)
        chosen, f1, length, f = trial.search(_descents(solve))
        ratio = reduction_ratio(work.loss, f1, chosen.predicted, self._eps)
        report = work.report(
            Reason.STEP_ACCEPTED if length else Reason.NO_DECREASE,
            solve,
            length,
            f,
            ratio,
            trial.evaluations,
        )
        self._last = chosen.x if length else None
        if length and solve.reason is not Reason.NEGATIVE_CURVATURE:
            self._damping.update(ratio)
        else:
            self._damping.fail()
        return report

    def make_preconditioner(self, operator: GlobalOperator) -> Precondition | None:
        """This step's preconditioner for ``operator + damping·I``."""
        if callable(self.preconditioner):
            return self.preconditioner(operator, self.damping)
        if self.preconditioner == "jacobi":
            # a probe that is not finite is so on every rank; the solve goes on without, and meets the same trouble or not
            with contextlib.suppress(NonFiniteError):
                return jacobi(operator, self.damping, seed=stream_seed(self._seed, self._steps, 1))
        return None

    def warm_start(self) -> Tensor | None:
        """Where this step's CG starts."""
        return None if self._last is None or not self._decay else self._last * self._decay

    def _facts(self) -> dict[str, str]:
        """The settings that must be the same on all ranks; the operator compares the parameters."""
        preconditioner = self.preconditioner
        if callable(preconditioner):
            preconditioner = getattr(preconditioner, "__qualname__", type(preconditioner).__qualname__)
        return {
            "curvature": self.curvature,
            "preconditioner": preconditioner,
            **{f"CG's {name}": repr(value) for name, value in self._solve_options.items()},
            "damping": repr(self.damping),
            "warm_start_decay": repr(self._decay),
            "curvature_fraction": repr(self._fraction),
            "seed": repr(self._seed),
            "step": repr(self._steps),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on exactly: damping, warm start and step number."""
        first = self.parameters.tensors[0]
        self.state[first] = {"damping": self.damping, "steps": self._steps, "last": self._last}
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of :meth:`state_dict`.

        Raises:
            UsageError: If it belongs to another number of parameters.
        """
        super().load_state_dict(state_dict)
        state = self.state[self.parameters.tensors[0]]
        last = state["last"]
        if last is not None and last.numel() != self.parameters.numel:
            raise UsageError(f"the state has a direction of {last.numel()} numbers, the module {self.parameters.numel}")
        self._damping.damping, self._steps = float(state["damping"]), int(state["steps"])
        self._last = None if last is None else last.clone()


class _Step:
    """The part of a step that needs graphs: gradient, curvature and solve at one θ, on one set of samples."""

    def __init__(self, optimizer: HessianFree, shard: Sequence[Any], seed: int) -> None:
        self.optimizer, self.shard, self.seed = optimizer, shard, seed
        self.objective, self.parameters = optimizer.objective, optimizer.parameters
        self.coordinator = optimizer.coordinator
        self.theta = self.parameters.read()
        self.products = 0
        self.non_finite: dict[int, NonFinite | None] = {}

    def solve(self) -> Solution | None:
        """The solve, or None at a stationary point; no graph is alive when it returns."""
        optimizer = self.optimizer
        full = optimizer._fraction == 1.0
        with self._operator(self._graph() if full else GradientGraph, self.shard, move_buffers=True) as at:
            self.loss, self.gradient, self.count = at.loss, at.gradient, at.count
            self.gradient_norm = math.sqrt(at.space.dots((at.gradient, at.gradient))[0])
            _average_buffers(optimizer, at)
            if self.gradient_norm == 0:
                return None
            if full:
                return self._solve_on(at)
            chosen = _subsample(self.shard, at.rows, optimizer.comm.rank, optimizer._fraction, self.seed)
        with self._operator(self._graph(), chosen) as curvature:
            return self._solve_on(curvature)

    def point(self) -> Point:
        """Where the step starts, for the search."""
        return Point(
            self.objective,
            self.parameters,
            self.coordinator,
            self.shard,
            self.seed,
            self.theta,
            self.loss,
            self.gradient,
        )

    def report(
        self,
        reason: Reason,
        solve: Solution | None,
        length: float,
        loss_after: float,
        ratio: float,
        evaluations: int = 0,
    ) -> StepReport:
        return StepReport(
            reason,
            self.loss,
            loss_after,
            self.gradient_norm,
            length,
            self.optimizer.damping,
            ratio,
            solve,
            self.products,
            evaluations,
            0.0,
            non_finite=self.non_finite,
        )

    def _solve_on(self, operator: GlobalOperator) -> Solution:
        optimizer = self.optimizer
        solution = cg(
            operator.shifted(optimizer.damping),
            -self.gradient,
            x0=optimizer.warm_start(),
            preconditioner=optimizer.make_preconditioner(operator),
            **optimizer._solve_options,
        )
        self.products = operator.products
        if solution.reason is Reason.NON_FINITE:
            self.non_finite = operator.non_finite
        return solution

    def _operator(self, build: BuildGraph, shard: Sequence[Any], *, move_buffers: bool = False) -> GlobalOperator:
        return GlobalOperator(
            self.objective,
            shard,
            build=build,
            seed=self.seed,
            coordinator=self.coordinator,
            move_buffers=move_buffers,
            debug_nonfinite=self.optimizer._debug_nonfinite,
        )

    def _graph(self) -> BuildGraph:
        if self.optimizer.curvature == "fisher":
            return functools.partial(FisherGraph, seed=self.seed)
        return GaussNewtonGraph if self.optimizer.curvature == "ggn" else HessianGraph


def _descents(solve: Solution) -> Sequence[Iterate]:
    """The iterates to search; where the first direction already had non-positive curvature, that direction."""
    if solve.iterations == 0 and solve.direction is not None and not solve.x.any():
        return [Iterate(0, solve.direction, math.nan)]
    return solve.iterates


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


def _average_buffers(optimizer: HessianFree, at: GlobalOperator) -> None:
    """Give all ranks the sample-weighted mean of the running statistics that this step's forward pass has moved."""
    comm = optimizer.comm
    buffers = moving_buffers(optimizer.objective.module)
    if comm.size == 1 or not buffers:
        return
    weight = at.rows[comm.rank] / sum(at.rows)
    flat = torch.cat([b.detach().double().reshape(-1) * weight for b in buffers])
    comm.all_reduce(flat)
    for buffer, mean in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.data.copy_(mean.view_as(buffer).round() if not buffer.is_floating_point() else mean.view_as(buffer))


def _restore(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.data.copy_(value)


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(f"{name} {value!r} is unknown; choose from {', '.join(choices)}")
