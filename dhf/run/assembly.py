"""assemble(): the problem, its shards and the optimizer that a configuration asks for."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence

import torch

from dhf.comm import Communicator
from dhf.coordinator import Coordinator
from dhf.curvature import FisherGraph, GaussNewtonGraph, GradientGraph, HessianGraph
from dhf.curvature.shard import BuildGraph
from dhf.errors import UsageError
from dhf.objective import Objective
from dhf.optim import FirstOrder, HessianFree
from dhf.optim.settings import Settings
from dhf.parameters import Parameters
from dhf.problems import Problem, Shard, build_problem
from dhf.run.config import Config
from dhf.run.schedule import Phase

__all__ = ["Parts", "assemble", "for_phase", "graph_builder", "problem_of"]


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """What a run works with on one rank.

    Attributes:
        problem: The model with its data.
        train: This rank's share of the training data.
        validation: Its share of the held-out data, or None.
        optimizer: What takes the steps.
        phase: The phase that shards and optimizer are of.
    """

    problem: Problem
    train: Shard
    validation: Shard | None
    optimizer: HessianFree | FirstOrder
    phase: Phase


def assemble(phase: Phase, later: Sequence[Phase], comm: Communicator, coordinator: Coordinator) -> Parts:
    """The parts of a run in one of its phases; the same on every rank, since the seed is.

    Raises:
        UsageError: If a setting of this phase or of a later one does not go with the problem.
    """
    config = phase.config
    torch.set_flush_denormal(True)  # denormal inputs make gradients on CPUs an order of magnitude slower
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    problem, dtype = problem_of(config)
    objective = problem.objective
    objective.module.to(device=comm.device, dtype=dtype)
    if config.weight_decay is not None:
        objective.weight_decay = config.weight_decay
    for other in later:
        _optimizer(other, objective, coordinator)  # what is wrong with it is said before the first step
    return for_phase(problem, phase, comm, coordinator)


def for_phase(problem: Problem, phase: Phase, comm: Communicator, coordinator: Coordinator) -> Parts:
    """The parts of one phase: the problem as it stands, the phase's own batches, and its optimizer from the start."""
    config, held_out = phase.config, problem.validation
    shard = functools.partial(
        Shard,
        rank=comm.rank,
        size=comm.size,
        device=comm.device,
        dtype=Parameters(problem.objective.module).dtype,
        micro_batch_size=None if config.micro_batch_size == "auto" else config.micro_batch_size,
    )
    return Parts(
        problem,
        shard(problem.train, batch_size=config.batch_size, seed=config.seed),
        None if held_out is None else shard(held_out),
        _optimizer(phase, problem.objective, coordinator),
        phase,
    )


def graph_builder(optimizer: HessianFree | FirstOrder) -> BuildGraph:
    """The kind of graph that a run's steps build."""
    if isinstance(optimizer, FirstOrder) or optimizer.settings.solver == "direct":
        return GradientGraph
    kinds: dict[str, BuildGraph] = {"ggn": GaussNewtonGraph, "hessian": HessianGraph, "fisher": FisherGraph}
    return kinds[optimizer.settings.curvature]


def problem_of(config: Config) -> tuple[Problem, torch.dtype]:
    """The problem of a run, built with random numbers of its dtype; its module is still to be moved to that."""

    def build(dtype: str) -> Problem:
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, dtype))
        torch.manual_seed(config.seed)
        try:
            return build_problem(config.problem, config.options)
        finally:
            torch.set_default_dtype(before)

    dtype: str = "float32" if config.dtype == "auto" else config.dtype
    problem = build(dtype)
    if config.dtype == "auto" and problem.dtype != dtype:
        dtype = str(problem.dtype)
        problem = build(dtype)
    return problem, getattr(torch, dtype)


def _optimizer(phase: Phase, objective: Objective, coordinator: Coordinator) -> HessianFree | FirstOrder:
    try:
        return _optimizer_of(phase.config, objective, coordinator)
    except UsageError as error:
        raise UsageError(f"{phase.prefix}{error}") from None


def _optimizer_of(config: Config, objective: Objective, coordinator: Coordinator) -> HessianFree | FirstOrder:
    if config.optimizer != "hf":
        return FirstOrder(
            objective,
            coordinator,
            method=config.optimizer,
            learning_rate=config.learning_rate,
            seed=config.seed,
            debug_nonfinite=config.debug_nonfinite,
        )
    chosen = {f.name: getattr(config, f.name) for f in dataclasses.fields(Settings) if hasattr(config, f.name)}
    return HessianFree(
        objective,
        coordinator=coordinator,
        preset=config.preset,
        seed=config.seed,
        debug_nonfinite=config.debug_nonfinite,
        **chosen,
    )
