"""The end of a run on disk and on the terminal: result.json, the pictures, and five lines."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from dhf.errors import CommunicationError
from dhf.problems import Problem
from dhf.reason import Reason
from dhf.run.directory import RunDirectory
from dhf.run.entry import tell_launcher
from dhf.run.monitor import Monitor
from dhf.run.outcome import in_words
from dhf.run.plot import draw_run
from dhf.run.profile import ProfileTotals
from dhf.run.records import read_run

__all__ = ["Ending", "sum_up", "write_result"]


@dataclasses.dataclass(frozen=True, slots=True)
class Ending:
    """How a run ended.

    Attributes:
        reason: Why.
        code: The process's exit code.
        failure: The error that ended it, or None.
        failed_rank: The rank it comes from, where it comes from one.
        steps: Steps done, those before a resume included.
        new_steps: Of these, taken by this run.
        first_loss: The objective when it started.
        loss: The objective at the end.
        target_loss: What it should have reached, or None.
        seconds: Of training, in this run.
        seconds_before: Of training before a resume.
        products: Curvature products of this run.
        product_steps: The steps that took them.
        product_seconds: The time of those steps.
        factorised: Whether matrices were formed and factorised.
        ranks: How many took part.
        pace: The slowest rank in words, or nothing.
        peak_memory_mb: The most memory that a rank has held at once, in 10⁶ bytes.
        fallbacks: How many steps needed more damping, and how many the gradient.
        profile: Where the time went, if that was measured.
    """

    reason: Reason
    code: int
    failure: Exception | None
    failed_rank: int | None
    steps: int
    new_steps: int
    first_loss: float
    loss: float
    target_loss: float | None
    seconds: float
    seconds_before: float
    products: int
    product_steps: int
    product_seconds: float
    factorised: bool
    ranks: int
    pace: str
    peak_memory_mb: float
    fallbacks: Mapping[str, int]
    profile: ProfileTotals | None


def write_result(ending: Ending, directory: RunDirectory, monitor: Monitor) -> None:
    """Write result.json, and the exit code where a launcher has asked for it.

    Ranks that have lost another leave alone what that one has written of its own failure.
    """
    if isinstance(ending.failure, CommunicationError) and (directory.path / "result.json").exists():
        return
    result = {
        "reason": ending.reason.name,
        "exit_code": ending.code,
        "steps": ending.steps,
        "loss": ending.loss,
        "wall_time": ending.seconds_before + ending.seconds,
        "world_size": ending.ranks,
        "products": ending.products,
        "peak_memory_mb": ending.peak_memory_mb,
        "fallbacks": dict(ending.fallbacks),
        "failed_rank": ending.failed_rank,
        "error": None if ending.failure is None else in_words(ending.failure),
    }
    if ending.profile is not None:
        result["profile"] = ending.profile.summary(ending.seconds)
    try:
        directory.write_result(result)
    except OSError as error:
        monitor.say(f"warning: result.json was not written: {error}")
    tell_launcher(ending.code)


def sum_up(ending: Ending, directory: RunDirectory, monitor: Monitor, problem: Problem) -> None:
    """Draw the pictures, and say in five lines how it went."""
    pictures = _draw(directory, monitor, problem) if ending.new_steps else []
    steps, seconds = max(ending.new_steps, 1), ending.seconds
    failed = ", ".join(f"{count} by {name}" for name, count in sorted(ending.fallbacks.items()))
    target = "" if ending.target_loss is None else f" (target {ending.target_loss:g})"
    for line in (
        f"ended    {ending.reason.words}: {ending.reason.advice}",
        f"loss     {ending.first_loss:.6g} -> {ending.loss:.6g} in {ending.new_steps} steps{target}",
        *([f"rescued  steps that failed at first: {failed}"] if failed else []),
        f"time     {seconds:.1f} s of training, {seconds / steps:.2f} s a step{ending.pace}",
        _products(ending),
        *([] if ending.profile is None else ending.profile.table(ending.seconds)),
        f"written  {directory.path}" + "".join(f"\n         {path}" for path in pictures),
    ):
        monitor.say(line)


def _products(ending: Ending) -> str:
    if not ending.products:
        return f"products none{': the matrix of each step was formed and factorised' if ending.factorised else ''}"
    steps, seconds = max(ending.product_steps, 1), max(ending.product_seconds, 1e-9)
    return (
        f"products {ending.products:,}, {ending.products / steps:.0f} on each step's graphs (built once), "
        f"{ending.products / seconds:.0f} a second on {ending.ranks} rank(s)"
    )


def _draw(directory: RunDirectory, monitor: Monitor, problem: Problem) -> list[Path]:
    """The run's pictures; a missing matplotlib or a fault in drawing never changes how a run ended."""
    try:
        paths = [draw_run(read_run(directory.path), directory.plots / "run.png")]
        if problem.pictures is not None:
            paths += problem.pictures(problem.objective.module, directory.plots) or []
    except ImportError:
        monitor.say("no pictures: matplotlib is not installed; pip install 'dhf[plot]'")
        return []
    except Exception as error:
        monitor.say(f"no pictures: {type(error).__name__}: {error}")
        return []
    return paths
