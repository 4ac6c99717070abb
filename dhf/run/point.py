"""Point: where a command looks at a problem: its data, and its parameters as they are made, or as a run has left them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from dhf.coordinator import Coordinator
from dhf.errors import UsageError
from dhf.objective import Objective
from dhf.problems import Shard
from dhf.run.assembly import Parts, assemble, for_phase
from dhf.run.checkpoint import decode, find, load_module
from dhf.run.config import Config
from dhf.run.micro_batches import choose_size, settled
from dhf.run.preflight import require_same_problem
from dhf.run.saver import share
from dhf.run.schedule import Phase

__all__ = ["Point", "sizes_in_words", "take_place"]

_OF_A_RUN = ("problem", "dtype", "seed", "weight_decay", "micro_batch_size")


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """A problem at one point, on one rank.

    Attributes:
        config: The settings, those of the run in their place.
        parts: The problem, this rank's shards, and the optimizer that a run with these settings would start with.
        where: The point in words.
        step: Of the run that it is taken from; None for the initial parameters.
    """

    config: Config
    parts: Parts
    where: str
    step: int | None

    @property
    def objective(self) -> Objective:
        """What is differentiated."""
        return self.parts.problem.objective

    @property
    def train(self) -> Shard:
        """This rank's share of the training data."""
        return self.parts.train


def take_place(
    config: Config,
    given: Collection[str],
    at: str | None,
    coordinator: Coordinator,
    tell: Callable[[str], None],
) -> Point:
    """Build the problem on every rank, and put the parameters of a run's newest checkpoint into it. Collective.

    Args:
        config: The settings.
        given: The names of those that the user has set; the others that make the problem are the run's.
        at: A run directory or a checkpoint, which only rank 0 need see; None for the initial parameters.
        coordinator: How ranks agree.
        tell: Called with what a person should know.

    Raises:
        UsageError: If there is no checkpoint, it is damaged, or of another model.
        RanksDifferError: If ranks have built different problems.
    """
    found = None if at is None else _checkpoint(at, coordinator, tell)
    if found is not None:
        config = _with_settings_of(config, found[1]["config"], given)
    phase = Phase(1, 0, config, 0, None)
    parts = coordinator.attempt(lambda: assemble(phase, [], coordinator.comm, coordinator))
    require_same_problem(coordinator, parts.problem.objective, parts.train, parts.validation)
    if config.micro_batch_size == "auto":
        size, note = choose_size(parts, coordinator, 0)
        tell(note)
        config = settled(config, {1: size})
        phase = dataclasses.replace(phase, config=config)
        parts = coordinator.attempt(lambda: for_phase(parts.problem, phase, coordinator.comm, coordinator))
    if found is None:
        return Point(config, parts, "the initial parameters", None)
    path, state = found
    coordinator.attempt(functools.partial(load_module, parts.problem.objective.module, state["module"], path))
    step = int(state["progress"]["step"])
    return Point(config, parts, f"step {step} of {path.parent.parent}", step)


def _checkpoint(at: str, coordinator: Coordinator, tell: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """The newest whole checkpoint, read by rank 0 for all."""

    def look() -> tuple[Path, bytes, list[str]]:
        found, damaged = find(Path(at))
        if found is None:
            hint = damaged[0] if damaged else "give a run directory or a checkpoint folder"
            raise UsageError(f"--at {at}: there is no whole checkpoint; {hint}")
        return *found, damaged

    leads = coordinator.comm.rank == 0
    mine = coordinator.attempt(lambda: look() if leads else None)
    for text in mine[2] if mine else []:
        tell(f"warning: {text}")
    path = coordinator.comm.gather_objects(mine[0] if mine else None)[0]
    content = share(coordinator.comm, mine[1] if mine else None)
    return path, coordinator.attempt(lambda: decode(content))


def _with_settings_of(config: Config, run: dict[str, Any], given: Collection[str]) -> Config:
    """The settings, with those of a run where the user has given none."""
    taken = {name: run[name] for name in _OF_A_RUN if name not in given and name in run}
    if "problem" not in given:
        taken["options"] = {**run.get("options", {}), **config.options}
    return dataclasses.replace(config, **taken)


def sizes_in_words(point: Point) -> str:
    """How large a problem is."""
    train = point.train
    n = sum(p.numel() for p in point.objective.module.parameters() if p.requires_grad)
    dtype = str(next(point.objective.module.parameters()).dtype).removeprefix("torch.")
    return f"{n:,} parameters in {dtype}, {train.batch_size:,} of {train.samples:,} samples"
