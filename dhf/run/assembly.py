"""assemble(): the problem, its shards and the optimizer that a configuration asks for."""

from __future__ import annotations

import dataclasses
import functools
import os

import torch

from dhf.comm import Communicator
from dhf.coordinator import Coordinator
from dhf.curvature import FisherGraph, GaussNewtonGraph, GradientGraph, HessianGraph
from dhf.curvature.shard import BuildGraph
from dhf.objective import Objective
from dhf.optim import FirstOrder, HessianFree
from dhf.problems import Problem, Shard, build_problem
from dhf.run.config import Config

__all__ = ["Parts", "assemble", "graph_builder"]


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """What a run works with on one rank.

    Attributes:
        problem: The model with its data.
        train: This rank's share of the training data.
        validation: Its share of the held-out data, or None.
        optimizer: What takes the steps.
    """

    problem: Problem
    train: Shard
    validation: Shard | None
    optimizer: HessianFree | FirstOrder


def assemble(config: Config, comm: Communicator, coordinator: Coordinator) -> Parts:
    """The parts of a run; the same on every rank, since the seed is."""
    torch.set_flush_denormal(True)  # denormal inputs make gradients on CPUs an order of magnitude slower
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    dtype = getattr(torch, config.dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(config.seed)
    try:
        problem = build_problem(config.problem, config.options)
    finally:
        torch.set_default_dtype(before)
    objective = problem.objective
    objective.module.to(device=comm.device, dtype=dtype)
    if config.weight_decay is not None:
        objective.weight_decay = config.weight_decay
    shard = functools.partial(
        Shard,
        rank=comm.rank,
        size=comm.size,
        device=comm.device,
        dtype=dtype,
        micro_batch_size=config.micro_batch_size,
    )
    return Parts(
        problem,
        shard(problem.train, batch_size=config.batch_size, seed=config.seed),
        None if problem.validation is None else shard(problem.validation),
        _optimizer(config, objective, coordinator),
    )


def graph_builder(config: Config) -> BuildGraph:
    """The kind of graph that a run's steps build."""
    if config.optimizer != "hf":
        return GradientGraph
    kinds: dict[str, BuildGraph] = {"ggn": GaussNewtonGraph, "hessian": HessianGraph, "fisher": FisherGraph}
    return kinds[config.curvature]


def _optimizer(config: Config, objective: Objective, coordinator: Coordinator) -> HessianFree | FirstOrder:
    if config.optimizer != "hf":
        return FirstOrder(
            objective,
            coordinator,
            method=config.optimizer,
            learning_rate=config.learning_rate,
            seed=config.seed,
        )
    return HessianFree(
        objective,
        coordinator=coordinator,
        curvature=config.curvature,
        preconditioner=config.preconditioner,
        solver=config.solver,
        damping=config.damping,
        cg_max_iterations=config.cg_max_iterations,
        cg_rtol=config.cg_rtol,
        curvature_fraction=config.curvature_fraction,
        seed=config.seed,
        debug_nonfinite=config.debug_nonfinite,
    )
