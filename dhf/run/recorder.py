"""Recorder: what rank 0 writes of each step: its line of metrics, the history of chosen solves, and TensorBoard's events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dhf.optim import StepReport
from dhf.run.chosen import is_chosen
from dhf.run.config import Config
from dhf.run.directory import RunDirectory
from dhf.run.events import Events

__all__ = ["Recorder", "solve_row"]


class Recorder:
    """Writes steps as they come. A disk that is full does not end a run: it is said, and what is left is written later.

    Args:
        directory: The run's.
        config: Which solves are recorded, and whether events are written.
        first_step: Steps that were done before.
        say: Takes a warning.
    """

    def __init__(self, directory: RunDirectory, config: Config, first_step: int, say: Callable[[str], None]) -> None:
        self._directory, self._chosen, self._say = directory, str(config.record_solves), say
        self._events = Events(directory.events, first_step) if config.tensorboard else None

    def step(self, row: dict[str, Any], report: StepReport, phase_began: int = 0) -> None:
        """One step: its metrics, those of the problem included, and what it reports; its phase began after so many steps."""
        self._write("metrics", lambda: self._directory.append(row))
        if report.solve is not None and report.products and is_chosen(self._chosen, row["step"], phase_began):
            solve = solve_row(row["step"], report)
            self._write("solves", lambda: self._directory.append_solve(solve))
        if self._events is not None:
            events = self._events
            self._try_events(lambda: events.step(row))

    def _try_events(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self._say(f"warning: no more events for TensorBoard, since they cannot be written: {error}")
            self._events = None

    def _write(self, what: str, append: Callable[[], None]) -> None:
        try:
            append()
        except OSError as error:
            self._say(f"warning: {what} are kept in memory, since they cannot be written: {error}")

    def close(self) -> None:
        """Close what is open."""
        if self._events is not None:
            self._try_events(self._events.close)


def solve_row(step: int, report: StepReport) -> dict[str, Any]:
    """The history of a step's solve: a number per iteration, the start first."""
    solve = report.solve
    assert solve is not None
    return {
        "step": step,
        "reason": solve.reason.name,
        "iterations": solve.iterations,
        "damping": report.damping,
        "right_hand_side_norm": report.gradient_norm,
        "true_residual_norm": solve.true_residual_norm,
        "iteration": [line.number for line in solve.history],
        "residual_norm": [line.residual_norm for line in solve.history],
        "model": [line.model for line in solve.history],
        "curvature": [line.curvature for line in solve.history],
    }
