"""restored_problem(): the problem of a run on disk, with the model as its newest checkpoint has it."""

from __future__ import annotations

import dataclasses

from dhf.errors import UsageError
from dhf.problems import Problem
from dhf.run.assembly import problem_of
from dhf.run.checkpoint import decode, find, load_module
from dhf.run.config import Config
from dhf.run.records import RunRecord

__all__ = ["restored_problem"]


def restored_problem(run: RunRecord) -> Problem | None:
    """The problem on a CPU, built anew with its model's tensors from the checkpoint; None where it has nothing to draw.

    Raises:
        UsageError: If there is no whole checkpoint, or the problem cannot be built as it was.
    """
    if "problem" not in run.config:
        raise UsageError(f"{run.path} has no config.yaml that names its problem")
    known = {field.name for field in dataclasses.fields(Config)}
    problem, dtype = problem_of(Config(**{name: value for name, value in run.config.items() if name in known}))
    if problem.pictures is None:
        return None
    found, damaged = find(run.path)
    if found is None:
        raise UsageError(damaged[0] if damaged else f"{run.path} has no checkpoint")
    module = problem.objective.module.to(dtype=dtype)
    load_module(module, decode(found[1])["module"], found[0])
    return problem
