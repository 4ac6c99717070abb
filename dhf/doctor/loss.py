"""The loss: is it finite, a mean over samples, and does every parameter take part in it?"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from dhf.curvature.gradient import scalar_loss
from dhf.doctor.conditions import as_in_a_run
from dhf.doctor.finding import ERROR, WARNING, Section, names, of_error
from dhf.evaluation import follows_batch
from dhf.objective import Objective
from dhf.parameters import Parameters

__all__ = ["look_at_loss"]

_TOLERANCE = 1e-3  # relative, of a mean that is put together from two halves; a sum misses it by a factor of two


def look_at_loss(objective: Objective, whole: Any, halves: tuple[Any, Any], seed: int) -> Section:
    """Facts and findings on one rank's own.

    Args:
        objective: What is looked at.
        whole: A few samples.
        halves: The same samples as two batches.
        seed: Fixes its random numbers.
    """
    section = Section("loss")
    parameters = Parameters(objective.module)
    try:
        with as_in_a_run(objective, seed):
            outputs = objective.outputs(whole)
            objective.check(outputs, whole)
            loss = scalar_loss(objective, outputs, whole)
            gradient = torch.autograd.grad(loss, parameters.tensors, allow_unused=True)
            loss = loss.detach()
        known = objective.known_loss()
        kind = (
            "one of yours: products differentiate it"
            if known is None
            else f"{type(known).__name__}, known in closed form"
        )
        section.fact("loss", f"{float(loss):.6g} on {objective.count(whole):g} samples; {kind}")
        if not math.isfinite(float(loss)):
            section.find(
                ERROR,
                f"the loss is {float(loss):g} at the start",
                "loss(outputs, batch)",
                "look for NaN in the data, overflow in the loss, or too large initial weights",
            )
        unused = [name for name, g in zip(parameters.names, gradient, strict=True) if g is None]
        section.fact(
            "parameters", f"{parameters.numel:,} in {len(parameters.names)} tensors, {len(unused)} of them unused"
        )
        if unused:
            section.find(
                WARNING,
                "the loss does not depend on it: its curvature is zero, and solves without damping are singular",
                names("parameter", unused),
                "requires_grad_(False), or take it out of the module",
            )
        with _without_dropout(objective.module), _norms_in_eval(objective.module) as norms:
            _is_mean(section, objective, whole, halves, seed, ", were BatchNorm in eval()" if norms else "")
    except Exception as error:
        section.findings.append(of_error(error, "outputs(batch) or loss(outputs, batch)"))
    return section


def _is_mean(
    section: Section, objective: Objective, whole: Any, halves: tuple[Any, Any], seed: int, condition: str
) -> None:
    """Whether ``N f = n₁ f₁ + n₂ f₂``, on which summing over micro-batches and ranks rests."""
    f, f1, f2 = (_value(objective, batch, seed) for batch in (whole, *halves))
    # what changes by itself, which is found elsewhere, cannot be compared
    if f != _value(objective, whole, seed) or f != _value(objective, whole, seed + 1):
        section.fact("mean over samples", "not known: the loss is another one each time")
        return
    n, n1, n2 = (objective.count(batch) for batch in (whole, *halves))
    if not n1 or not n2 or not all(map(math.isfinite, (f, f1, f2))):
        return
    mean, total = (n1 * f1 + n2 * f2) / n, f1 + f2
    scale = max(abs(f), abs(mean), abs(f1), abs(f2))
    if scale == 0 or abs(f - mean) <= _TOLERANCE * scale:
        section.fact("mean over samples", f"yes, as two halves put together tell{condition}")
        return
    section.fact("mean over samples", "NO")
    if abs(f - total) <= _TOLERANCE * max(abs(f), abs(total)):
        section.find(
            ERROR,
            f"the loss is a sum over samples, not their mean: {f:.6g} for all, {f1:.6g} and {f2:.6g} for the halves",
            "loss(outputs, batch)",
            "divide it by the number of samples: .mean(), or reduction='mean'",
        )
        return
    section.find(
        ERROR,
        f"the loss is no mean over samples: {f:.6g} for all, where its halves put together give {mean:.6g}",
        "loss(outputs, batch), or count(batch)",
        "return the mean over samples that do not depend on one another, and their weight by count(batch)",
    )


def _value(objective: Objective, batch: Any, seed: int) -> float:
    with as_in_a_run(objective, seed):
        return float(objective.loss(objective.outputs(batch), batch).detach())


@contextlib.contextmanager
def _without_dropout(module: torch.nn.Module) -> Iterator[None]:
    with _in_eval([m for m in module.modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd)]):
        yield


@contextlib.contextmanager
def _norms_in_eval(module: torch.nn.Module) -> Iterator[Sequence[torch.nn.Module]]:
    """BatchNorm on its running statistics, where it has some; the layers. That they depend on the batch is found elsewhere."""
    norms = [m for m in module.modules() if isinstance(m, torch.nn.modules.batchnorm._NormBase) and follows_batch(m)]
    with _in_eval(norms):
        yield norms


@contextlib.contextmanager
def _in_eval(modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    before = [m.training for m in modules]
    for m in modules:
        m.training = False
    try:
        yield
    finally:
        for m, training in zip(modules, before, strict=True):
            m.training = training
