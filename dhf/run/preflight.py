"""preflight: what must be the same on all ranks, compared before the first tensor is reduced.

Tensors of different shape or dtype on two ranks end a process without a Python error, and different settings or data end in
wrong answers. Versions are compared earlier still, when the ranks connect.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dhf.coordinator import Coordinator, capture
from dhf.objective import Objective
from dhf.parameters import Parameters
from dhf.problems import Shard
from dhf.run.config import Config

__all__ = ["require_same_problem", "require_same_settings"]

_FREE = ("threads",)  # what ranks may differ in without harm


def require_same_settings(coordinator: Coordinator, config: Config, own: Any = None) -> None:
    """Raise RanksDifferError on every rank if two ranks were given different settings; ``own`` holds those of a command."""
    settings = dataclasses.asdict(config) | (dataclasses.asdict(own) if own is not None else {})
    facts = {
        f"--{name.replace('_', '-')}": "not given" if value is None else repr(value)
        for name, value in settings.items()
        if name not in _FREE
    }
    coordinator.require_same(facts)


def require_same_problem(
    coordinator: Coordinator, objective: Objective, train: Shard, validation: Shard | None
) -> None:
    """Raise RanksDifferError on every rank if two ranks have built different models, objectives or data."""
    facts, failure = capture(lambda: _facts(objective, train, validation))
    coordinator.require_same(facts or {}, failure=failure)


def _facts(objective: Objective, train: Shard, validation: Shard | None) -> dict[str, str]:
    loss = objective.known_loss()
    facts = {
        "objective": type(objective).__qualname__,
        "loss": "the user's own" if loss is None else type(loss).__qualname__,
        "weight decay": repr(objective.weight_decay),
        "module": type(objective.module).__qualname__,
        **Parameters(objective.module).facts(),
    }
    for name, shard in (("the training data", train), ("the validation data", validation)):
        facts |= {f"{what} of {name}": value for what, value in (shard.facts() if shard else {}).items()}
    return facts
