"""HessianFree: a torch optimizer whose step is a damped Newton or Gauss-Newton solve.

One step, at parameters θ:

    1. gradient g and curvature B on graphs built once           (one pass over the data)
    2. (B + λI) d = -g, or its minimiser in a trust region        (one product and one collective per iteration)
    3. the graphs are freed; only then do parameters move
    4. d whole, or d among the solve's iterates and then a step length s, by the objective itself
    5. λ or the radius from the reduction ratio (f(θ + d) - f(θ)) / (gᵀd + ½dᵀBd)

A step that fails climbs down a ladder: an earlier iterate of the same solve, more damping at once where that needs no graph,
more damping in the next step, and at the third failure in a row the gradient. Every number that decides anything is a sum over
ranks, or rank 0's, so that all ranks take the same step.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dhf.batches import micro_batches
from dhf.comm import Communicator, Serial
from dhf.coordinator import Coordinator, capture
from dhf.curvature import GradientGraph, Retention
from dhf.errors import PerSampleError, UsageError
from dhf.evaluation import moving_buffers, restore_buffers, stream_seed
from dhf.objective import Objective, require_objective
from dhf.operator import GlobalOperator
from dhf.optim.choices import choose_vectors, in_words, make_preconditioner, make_steering, name_of
from dhf.optim.linearisation import ROWS_COST, Bounds, Dense, Linearisation, MakePreconditioner, OnIteration
from dhf.optim.outcome import Outcome
from dhf.optim.report import StepReport, in_gradients
from dhf.optim.settings import Settings, resolve
from dhf.optim.trial import Point, Trial
from dhf.parameters import Parameters
from dhf.reason import Reason
from dhf.solvers import Iterate, Solution, forcing_term
from dhf.vector_space import VectorSpace

__all__ = ["HessianFree"]

_NOT_TAKEN = (Reason.INTERRUPTED, Reason.TIME_LIMIT)
_TOO_LARGE = 16.0  # GB that a dense matrix may take where it is asked for by name
_DAMPINGS = 12  # tried in one step where another damping needs no new graph
_GRADIENT_AFTER = 3  # failed steps in a row before the gradient is tried


class HessianFree(torch.optim.Optimizer):
    """Distributed Hessian-free optimisation: truncated Newton, Gauss-Newton, Levenberg-Marquardt or natural gradient.

    What is left at None comes from the preset; :attr:`settings` holds what is used, and docs/settings.md says why.

    Args:
        objective: What is minimised; its module's trainable parameters are what moves.
        comm: How ranks talk; one process by default.
        preset: ``"deep-net"``, ``"least-squares"``, ``"convex"``, or ``"auto"``: by the objective and the dtype.
        curvature: ``"ggn"`` (generalised Gauss-Newton), ``"hessian"`` or ``"fisher"`` (sampled labels).
        preconditioner: ``"none"``, ``"jacobi"``, ``"empirical-fisher"``, ``"kfac"``, ``"nystrom"``, or a function of (operator,
            damping) that returns ``r -> z``; ``"auto"`` is the preset's.
        preconditioner_rank: Directions that nystrom samples.
        preconditioner_refresh: Steps between renewals of kfac (2) and nystrom (once it has been applied ``rank`` times).
        solver: ``"cg"``, ``"cgls"`` and ``"direct"`` (Gauss-Newton), ``"minres"``, ``"steihaug"`` (in a trust region), or
            ``"auto"``: direct where memory and operations say it is cheaper, else cgls for sums of squares and cg.
        globalisation: ``"levenberg-marquardt"``, ``"nielsen"`` or ``"trust-region"``.
        line_search: ``"armijo"`` or ``"grid"``, for steps that are not taken whole.
        damping: First λ of ``(B + λI) d = -g``; it adapts.
        damping_factor: Levenberg-Marquardt's factor on λ.
        damping_smallest: Least λ.
        radius: First radius of a trust region; it adapts.
        cg_max_iterations: Most iterations per solve.
        cg_rtol: Relative residual at which a solve stops.
        cg_forcing: Whether Eisenstat and Walker's forcing terms take the place of ``cg_rtol``.
        cg_progress_tolerance: Martens' relative-progress rule; none of the presets needs it.
        warm_start_decay: A solve starts at this multiple of the last solution; 0 starts at zero.
        curvature_fraction: Share of the samples that curvature is taken on, in (0, 1]; which samples depends on the seed,
            the step and the samples' order over ranks, not on how many ranks there are.
        vectors: ``"replicated"``: every rank holds each vector of a solve whole; ``"sharded"``: one piece; ``"auto"``: sharded
            where replicated ones would take more than a quarter of the memory.
        bucket_mb: With replicated vectors, the all-reduce of a product is cut at parameters into parts of at least so many
            megabytes, which start while the product is still being computed; 0, the default, for one at the end. On a network of
            1 Gbit/s, 0.25 repays; on faster ones it costs more than it hides.
        reduce_dtype: ``"bfloat16"`` has ranks send products of cg at half the bytes of float32; ``"full"`` by default.
        products: ``"retained"``, ``"traced"``, ``"compiled"`` or ``"auto"`` (the default), as in :class:`dhf.Hessian`.
        retain: Which micro-batches keep their graphs during a solve, on each rank: ``"all"``, ``"none"``, as many as fit into so
            many bytes (a number, or a text such as ``"2GiB"``), or ``"auto"``, the default: into the memory that is available.
            The others' are rebuilt for each product. Where memory runs out, less is kept, with a warning.
        seed: Names the random streams (dropout masks, sampled labels, sub-samples, probes); the same on all ranks.
        debug_nonfinite: Whether to search for the sample where a loss, gradient or product is not finite.
        coordinator: How ranks agree; made from ``comm`` by default.

    Attributes:
        preset: The preset's name.
        settings: Every number in use.
        notes: What was chosen and why, in sentences, as far as it is known; more may be known after the first step.
        on_iteration: Called with each Iteration of an iterative solver and the norm of the right-hand side, if it is set.

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
        preset: str = "auto",
        curvature: str | None = None,
        preconditioner: str | MakePreconditioner | None = None,
        preconditioner_rank: int | None = None,
        preconditioner_refresh: int | None = None,
        solver: str | None = None,
        globalisation: str | None = None,
        line_search: str | None = None,
        damping: float | None = None,
        damping_factor: float | None = None,
        damping_smallest: float | None = None,
        radius: float | None = None,
        cg_max_iterations: int | None = None,
        cg_rtol: float | None = None,
        cg_forcing: bool | None = None,
        cg_progress_tolerance: float | None = None,
        warm_start_decay: float | None = None,
        curvature_fraction: float | None = None,
        vectors: str | None = None,
        bucket_mb: float | None = None,
        reduce_dtype: str | None = None,
        products: str | None = None,
        retain: str | int | None = None,
        seed: int = 0,
        debug_nonfinite: bool = False,
        coordinator: Coordinator | None = None,
    ) -> None:
        given = dict(locals())
        require_objective(objective)
        self.objective = objective
        self.parameters = Parameters(objective.module)
        chosen = {f.name: given[f.name] for f in dataclasses.fields(Settings)}
        self.preset, self.settings = resolve(preset, objective, chosen)
        comm = comm if comm is not None else coordinator.comm if coordinator else Serial(self.parameters.device)
        self.comm = comm
        self.coordinator = coordinator or Coordinator(comm)
        self.steering = make_steering(self.settings)
        self.notes = [f"preset {self.preset}: {in_words(self.settings)}"]
        self._seed, self._debug_nonfinite = seed, debug_nonfinite
        self._precondition = make_preconditioner(self.settings, seed)
        self._steps = self._failures = 0
        self._last: Tensor | None = None
        self._forcing: tuple[float, float] | None = None  # the last gradient norm and forcing term
        self._eps = torch.finfo(self.parameters.dtype).eps
        self._verify, self._solver_is_open = True, self.settings.solver == "auto"
        self._retention: Retention | None = None
        self._graphs_told: tuple[int, int] | None = None  # kept and in all, as last noted
        self.on_iteration: OnIteration | None = None
        super().__init__(self.parameters.tensors, {})

    @property
    def damping(self) -> float:
        """The λ of the next step."""
        return self.steering.damping

    def step(self, batches: Iterable[Any]) -> StepReport:  # type: ignore[override]
        """Take one step on this rank's micro-batches; every rank calls it together.

        A step that finds no decrease leaves the parameters as they were, raises the damping, and reports NO_DECREASE. A step
        during which the coordinator learns of a stop signal or the time limit is not taken: nothing has changed then.

        Args:
            batches: This rank's micro-batches, each what ``objective.outputs`` takes; none for an empty shard. Any iterable, a
                DataLoader included, which is read once; :func:`dhf.shard` makes them from data.

        Raises:
            UsageError, RanksDifferError, NonFiniteError, RankError, ReplicasDivergedError, CommunicationError: On every
                rank alike; the parameters are then as they were.
        """
        began, waited = time.perf_counter(), self.coordinator.seconds_waiting
        self.coordinator.phases.begin()
        shard, failure = capture(lambda: micro_batches(batches))
        self.coordinator.require_same(self._facts(), failure=failure)
        assert shard is not None
        buffers = moving_buffers(self.objective.module)
        kept, memory = [b.clone() for b in buffers], self._memory()
        try:
            self._decide_solver(shard)
            self._decide_vectors()
            report = self._step_on(shard, lambda: restore_buffers(buffers, kept))
        except BaseException:
            restore_buffers(buffers, kept)
            self._remember(*memory)
            raise
        if report.reason in _NOT_TAKEN:
            restore_buffers(buffers, kept)
            self._remember(*memory)
        else:
            self._steps += 1
        profile = self.coordinator.phases.end()
        return dataclasses.replace(
            report,
            seconds=time.perf_counter() - began,
            seconds_waiting=self.coordinator.seconds_waiting - waited,
            gradient_equivalents=self._cost(report),
            profile=profile,
        )

    def _cost(self, report: StepReport) -> float:
        """What a step has cost, in gradients."""
        fraction, solver = self.settings.curvature_fraction, self.settings.solver
        gradients = 1.0 if fraction == 1.0 else 1.0 + fraction
        if solver == "direct":
            gradients += ROWS_COST * fraction
        return in_gradients(gradients, fraction * report.products, report.evaluations, self.settings.curvature)

    def _memory(self) -> tuple[Any, tuple[float, float] | None]:
        """What a step leaves behind for the next even before it is judged: the preconditioner's work, and the forcing term."""
        keeper = getattr(self._precondition, "state_dict", None)
        return keeper() if keeper else None, self._forcing

    def _remember(self, preconditioner: Any, forcing: tuple[float, float] | None) -> None:
        """Take up what :meth:`_memory` gave."""
        take_up = getattr(self._precondition, "load_state_dict", None)
        if preconditioner is not None and take_up is not None:
            take_up(preconditioner)
        self._forcing = forcing

    def _decide_solver(self, shard: Sequence[Any]) -> None:
        """Settle what ``solver="auto"`` stands for, once the data are seen."""
        settings = self.settings
        if settings.solver not in ("auto", "direct") or not self._verify:
            return
        with GlobalOperator(
            self.objective, shard, build=GradientGraph, coordinator=self.coordinator, seed=self._seed
        ) as at:
            dense = Dense.of(at)
        known = self.objective.known_loss() is not None
        if settings.solver == "direct":
            gigabytes = dense.memory / 1e9
            if gigabytes > _TOO_LARGE:
                raise UsageError(
                    f"solver direct would factorise {dense}, for which every rank needs {gigabytes:,.0f} GB; use cg or cgls"
                )
            gradients = dense.operations / dense.gradient
            self.notes.append(f"solver direct factorises {dense}: a step costs about {gradients:,.0f} gradients")
        elif known and dense.is_cheaper(settings.cg_max_iterations):
            self._take_solver("direct", f"it factorises {dense}")
        else:
            self._take_iterative(
                "the matrix is too large for direct" if known else "the loss has no known output Hessian"
            )

    def _decide_vectors(self) -> None:
        """Settle what ``vectors="auto"`` stands for."""
        if self.settings.vectors == "auto":
            vectors, note = choose_vectors(self.settings, self.parameters, self.comm)
            self.settings = dataclasses.replace(self.settings, vectors=vectors)
            self.notes += note

    def _policy(self) -> Retention:
        """The memory policy, made once, with what it has learned since. Collective, when it is called first."""
        if self._retention is None:
            sharers = 1 if self.parameters.device.type == "cuda" else self.coordinator.ranks_here()
            self._retention = Retention(self.settings.retain, sharers=sharers)
        return self._retention

    def _note_graphs(self, work: Linearisation) -> None:
        """Say how many graphs are kept, where they are not all, and when that changes."""
        now = work.retained, work.micro_batches
        if work.retained < work.micro_batches and now != self._graphs_told:
            self._graphs_told = now
            self.notes.append(
                f"graphs of {now[0]} of {now[1]} micro-batches are kept during a solve, the others rebuilt for each product"
            )

    def _take_iterative(self, why: str) -> None:
        self._take_solver("cgls" if self.objective.is_least_squares else "cg", why)
        self.notes.append(f"preconditioner {name_of(self.settings.preconditioner)}")

    def _take_solver(self, solver: str, why: str) -> None:
        self.settings = dataclasses.replace(self.settings, solver=solver)
        self.notes.append(f"solver {solver}: {why}")

    def _step_on(self, shard: Sequence[Any], undo: Callable[[], None]) -> StepReport:
        work = self._linearise(shard)
        try:
            solve = work.solve(self._bounds)
        except PerSampleError as error:
            if not self._solver_is_open:
                raise  # the user has asked for direct by name
            self._take_iterative(f"{error}; written with torch.func, direct would be faster")
            undo()
            work = self._linearise(shard)
            solve = work.solve(self._bounds)
        self._verify = self._solver_is_open = False
        self._note_graphs(work)
        if solve is None:
            return self._report(work, Reason.GRADIENT_ZERO, None)
        if solve.reason in _NOT_TAKEN:
            # a resumed run takes this step again, and so goes the way of a run that was never stopped
            return self._report(work, solve.reason, solve)
        return self._move(work, solve)

    def _linearise(self, shard: Sequence[Any]) -> Linearisation:
        return Linearisation(
            self.objective,
            self.parameters,
            self.coordinator,
            self.settings,
            shard,
            stream_seed(self._seed, self._steps),
            precondition=self._precondition,
            debug_nonfinite=self._debug_nonfinite,
            verify=self._verify,
            tell=self._note,
            retention=self._policy(),
            on_iteration=self.on_iteration,
        )

    def _note(self, words: str) -> None:
        if words not in self.notes:
            self.notes.append(words)

    def _bounds(self, gradient_norm: float) -> Bounds:
        settings = self.settings
        rtol = settings.cg_rtol
        if settings.cg_forcing:
            last, term = self._forcing or (None, None)
            rtol = forcing_term(gradient_norm, last, term)
            self._forcing = gradient_norm, rtol
        start = None if self._last is None or not settings.warm_start_decay else self._last * settings.warm_start_decay
        return Bounds(self.damping, self.steering.radius, rtol, start)

    def _move(self, work: Linearisation, solve: Solution) -> StepReport:
        """Judge the solution by the objective, and steer the next step by what was found."""
        trial = Trial(
            Point(
                self.objective,
                self.parameters,
                self.coordinator,
                work.shard,
                work.seed,
                work.theta,
                work.loss,
                work.gradient,
                work.space,
            )
        )
        fallback = ""
        for dampings in range(1, _DAMPINGS + 1):
            damping = self.damping
            if self.steering.full_step:
                tried = trial.whole(solve.iterates[-1] if solve.iterates else Iterate(0, solve.x, 0.0), damping)
            else:
                tried = trial.search(_descents(solve, work.space), damping, self.settings.line_search)
            outcome = Outcome(tried.ratio, solve.reason, tried.norm)
            if tried.length:
                self.steering.accept(outcome)
                break
            self.steering.fail(outcome)
            if self.steering.full_step and len(solve.iterates) > 1:
                fallback, tried = "iterate", trial.search(solve.iterates[:-1], damping)
            if tried.length or work.solve_again is None or dampings == _DAMPINGS:
                break
            fallback, solve = "damping", work.solve_again(self.damping)
        self._last = tried.x if tried.length and self.settings.warm_start_decay else None
        self._failures = 0 if tried.length else self._failures + 1
        if self._failures >= _GRADIENT_AFTER and tried.norm > 0:
            fallback = "gradient"
            downhill = Iterate(0, work.gradient * (-tried.norm / work.gradient_norm), math.nan)
            tried = trial.search([downhill], damping)
            self._failures = 0 if tried.length else self._failures
        report = self._report(work, Reason.STEP_ACCEPTED if tried.length else Reason.NO_DECREASE, solve)
        return dataclasses.replace(
            report,
            loss_after=tried.loss,
            step_length=tried.length,
            damping=damping,
            reduction_ratio=tried.ratio,
            evaluations=trial.evaluations,
            fallback=fallback if tried.length else "damping",
        )

    def _report(self, work: Linearisation, reason: Reason, solve: Solution | None) -> StepReport:
        """What a step reports whose parameters have not moved."""
        return StepReport(
            reason,
            work.loss,
            work.loss,
            work.gradient_norm,
            0.0,
            self.damping,
            math.nan,
            solve,
            work.products,
            0,
            0.0,
            non_finite=work.non_finite,
            radius=self.steering.radius,
        )

    def _facts(self) -> dict[str, str]:
        """The settings that must be the same on all ranks; the operator compares the parameters."""
        settings = {f.name: getattr(self.settings, f.name) for f in dataclasses.fields(self.settings)}
        return {
            **{name: name_of(value) if callable(value) else repr(value) for name, value in settings.items()},
            **{f"the steering's {name}": repr(value) for name, value in self.steering.state_dict().items()},
            "seed": repr(self._seed),
            "step": repr(self._steps),
        }

    def consolidate_state_dict(self) -> None:
        """Have every rank hold what the next :meth:`state_dict` needs, where ranks hold pieces of it. Collective."""
        gather = getattr(self._precondition, "consolidate", None)
        if self.settings.vectors == "sharded" and gather is not None:
            gather(self.coordinator, self.objective)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on exactly: steering, warm start, preconditioner and step number.

        Of a preconditioner of which this rank holds a piece alone (see :meth:`consolidate_state_dict`), nothing: a resumed run
        makes it anew.
        """
        preconditioner, forcing = self._memory()
        if not getattr(self._precondition, "is_whole", True):
            preconditioner = None
        self.state[self.parameters.tensors[0]] = {
            "steering": self.steering.state_dict(),
            "steps": self._steps,
            "failures": self._failures,
            "last": self._last,
            "forcing": forcing,
            "preconditioner": preconditioner,
        }
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
        self.steering.load_state_dict(state["steering"])
        self._steps, self._failures = int(state["steps"]), int(state["failures"])
        self._last = None if last is None else last.clone()
        forcing = state["forcing"]
        self._remember(state["preconditioner"], None if forcing is None else (float(forcing[0]), float(forcing[1])))


def _descents(solve: Solution, space: VectorSpace) -> Sequence[Iterate]:
    """The iterates to search. A direction of non-positive curvature goes on from the last one, and is searched first."""
    if solve.direction is None:
        return solve.iterates or [Iterate(0, solve.x, 0.0)]
    xx, dd = space.dots((solve.x, solve.x), (solve.direction, solve.direction))
    if xx == 0:
        return [Iterate(0, solve.direction, math.nan)]
    longer = solve.x + solve.direction * math.sqrt(xx / dd)
    return [*solve.iterates, Iterate(solve.iterations, longer, math.nan)]
