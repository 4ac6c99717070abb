"""examine: all checks in their order; what one cannot do without, it waits for, and what one rank finds, all know."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from dhf.comm import Communicator
from dhf.coordinator import Coordinator
from dhf.doctor.collectives import try_collectives
from dhf.doctor.cost import Advice, measure_cost
from dhf.doctor.determinism import compare_evaluations
from dhf.doctor.environment import look_around
from dhf.doctor.finding import ERROR, Section, merge, of_error
from dhf.doctor.loss import look_at_loss
from dhf.doctor.modules import probe_modules
from dhf.doctor.numerics import compare_with_differences
from dhf.doctor.trial import try_solve
from dhf.errors import CommunicationError, UsageError
from dhf.optim import HessianFree
from dhf.parameters import Parameters
from dhf.problems import Problem, Shard
from dhf.problems.data import as_data, some_of
from dhf.run.assembly import Parts, assemble
from dhf.run.config import Config
from dhf.run.preflight import require_same_problem
from dhf.run.schedule import Phase

__all__ = ["Examination", "examine"]

T = TypeVar("T")

_FEW = 8  # samples on which modules, determinism and finite differences are looked at


@dataclasses.dataclass(frozen=True, slots=True)
class Examination:
    """What was found.

    Attributes:
        sections: One per theme.
        advice: The recommended settings, or None where a problem could not be measured or there is none.
    """

    sections: list[Section]
    advice: Advice | None

    @property
    def ready(self) -> bool:
        """Whether nothing must be changed."""
        return not any(finding.must_change for section in self.sections for finding in section.findings)


def examine(config: Config, refusals: Sequence[UsageError], coordinator: Coordinator, *, problem: bool) -> Examination:
    """Look at everything, on all ranks together.

    Args:
        config: The settings that a run would have.
        refusals: Why the ranks have not connected as these say; they have as they could.
        coordinator: How ranks agree.
        problem: Whether to look at the problem, too.
    """
    comm = coordinator.comm
    environment = look_around(comm, os.environ)
    environment.findings += [of_error(error, "the flags") for error in refusals]
    sections = [environment, try_collectives(comm)]
    advice = _look_at_problem(config, coordinator, sections) if problem else None
    return Examination(sections, advice)


def _look_at_problem(config: Config, coordinator: Coordinator, sections: list[Section]) -> Advice | None:
    """Add the sections of a problem; the advice where it could be measured."""
    comm = coordinator.comm
    built = Section("problem")
    sections.append(built)
    parts = _attempt(built, f"the problem {config.problem}", lambda: _assemble(config, coordinator))
    if parts is None:
        return None
    _describe(built, parts, config, comm)
    objective, optimizer = parts.problem.objective, parts.optimizer
    if not isinstance(optimizer, HessianFree):
        built.find(ERROR, f"{config.optimizer} has no curvature to look at", "--optimizer", "--optimizer hf")
        return None
    few = functools.partial(_few, parts.problem, comm, config.seed)
    own = Parameters(objective.module).dtype
    curvature = "hessian" if optimizer.settings.curvature == "hessian" else "ggn"

    def locally(title: str, look: Callable[[], Section]) -> Section:
        section = _everywhere(comm, title, look)
        sections.append(section)
        return section

    modules = locally("modules", lambda: probe_modules(objective, few(own)[0], curvature, config.seed))
    locally("determinism", lambda: compare_evaluations(objective, few(own)[0], config.seed))
    locally("loss", lambda: look_at_loss(objective, *few(own), seed=config.seed))
    if any(finding.severity == ERROR for section in [built, *sections[-3:]] for finding in section.findings):
        modules.fact("not measured", "numbers, solves and costs: first the errors must be mended")
        return None
    locally("numerics", lambda: compare_with_differences(objective, lambda t: few(t)[0], curvature, config.seed))
    trial = Section("a trial solve")
    sections.append(trial)
    cost = Section("cost")
    measured = _attempt(cost, "the objective", lambda: measure_cost(parts, coordinator, config.seed))
    if measured is None:
        sections.append(cost)
        return None
    cost, advice = measured
    size = int(advice.flags["micro-batch-size"])

    def solve() -> Section:
        batch = coordinator.attempt(lambda: parts.train.first(0, size))
        return try_solve(objective, [] if batch is None else [batch], optimizer.settings, coordinator, config.seed)

    sections[-1] = _attempt(trial, "the objective", solve) or trial
    sections.append(cost)
    return advice


def _assemble(config: Config, coordinator: Coordinator) -> Parts:
    parts = coordinator.attempt(lambda: assemble(Phase(1, 0, config, 0, None), [], coordinator.comm, coordinator))
    require_same_problem(coordinator, parts.problem.objective, parts.train, parts.validation)
    return parts


def _describe(section: Section, parts: Parts, config: Config, comm: Communicator) -> None:
    train, parameters = parts.train, Parameters(parts.problem.objective.module)
    dtype = str(parameters.dtype).removeprefix("torch.")
    section.fact(
        "problem", f"{config.problem}, {type(parts.problem.objective.module).__name__} of {parameters.numel:,} {dtype}"
    )
    section.fact(
        "samples", f"{train.batch_size:,} a step of {train.samples:,}; {', '.join(map(str, train.sizes()))} per rank"
    )
    if parts.validation is not None:
        section.fact("validation", f"{parts.validation.samples:,} samples")


def _few(problem: Problem, comm: Communicator, seed: int, dtype: torch.dtype) -> tuple[Any, tuple[Any, Any]]:
    """The first samples of the data, the same on every rank: as one batch, and as two halves."""
    number = min(_FEW, len(as_data(problem.train)))
    some = some_of(problem.train, range(number))
    make = functools.partial(Shard, some, 0, 1, device=comm.device, dtype=dtype, seed=seed)
    whole = make(micro_batch_size=number).batches(0)[0]
    parts = make(micro_batch_size=-(-number // 2)).batches(0)
    return whole, (parts[0], parts[-1])


def _everywhere(comm: Communicator, title: str, look: Callable[[], Section]) -> Section:
    """What all ranks have found, each for itself; a check that fails is itself a finding."""
    try:
        mine = look()
    except Exception as error:
        mine = Section(title, findings=[of_error(error, "the objective")])
    return merge(comm.gather_objects(mine))


def _attempt(section: Section, where: str, work: Callable[[], T]) -> T | None:
    """What collective work returns; an error, which all ranks have alike, becomes a finding of the section."""
    try:
        return work()
    except CommunicationError:
        raise
    except Exception as error:
        section.findings.append(of_error(error, where))
        return None
