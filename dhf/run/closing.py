"""Closing: the end of a run on disk and on the terminal: result.json, the pictures, and five lines."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dhf.reason import Reason
from dhf.run.plot import draw_run

if TYPE_CHECKING:
    from dhf.run.trainer import Trainer

__all__ = ["Closing"]


class Closing:
    """What the rank that speaks for a run writes and says at its end.

    Args:
        run: The run.
    """

    def __init__(self, run: Trainer) -> None:
        self._run = run
        self._wall = time.monotonic() - run.began

    def write(self, reason: Reason, code: int, failure: Exception | None) -> None:
        """Write result.json, and the exit code where a launcher has asked for it."""
        run = self._run
        result = {
            "reason": reason.name,
            "exit_code": code,
            "steps": run.step,
            "loss": run.loss,
            "wall_time": run.wall_before + self._wall,
            "world_size": run.comm.size,
            "products": run.products,
            "failed_rank": getattr(failure, "rank", None),
            "error": None if failure is None else str(failure),
        }
        try:
            run.directory.write_result(result)
        except OSError as error:
            run.monitor.say(f"warning: result.json was not written: {error}")
        if "DHF_EXIT_CODE_FILE" in os.environ:  # torchrun does not tell its workers' codes when it was stopped itself
            with contextlib.suppress(OSError):
                Path(os.environ["DHF_EXIT_CODE_FILE"]).write_text(str(code))

    def say(self, reason: Reason) -> None:
        """Draw the pictures, and say in five lines how it went."""
        run, wall = self._run, self._wall
        run.monitor.visible = True
        pictures = self._draw() if run.step > run.first_step else []
        steps = run.step - run.first_step
        target = run.config.target_loss
        toward = "" if target is None else f" (target {target:g})"
        say = run.monitor.say
        say(f"ended    {reason.words}: {reason.advice}")
        say(f"loss     {run.first_loss:.6g} -> {run.loss:.6g} in {steps} steps{toward}")
        say(f"time     {wall:.1f} s of training, {wall / max(steps, 1):.2f} s a step{run.pace.words()}")
        say(
            f"products {run.products:,}, {run.products / max(steps, 1):.0f} on each step's graphs (built once), "
            f"{run.products / max(wall, 1e-9):.0f} a second on {run.comm.size} rank(s)"
        )
        say(f"written  {run.directory.path}" + "".join(f"\n         {path}" for path in pictures))

    def _draw(self) -> list[Path]:
        """The run's pictures; a missing matplotlib or a fault in drawing never changes how a run ended."""
        run = self._run
        plots, pictures = run.directory.plots, run.parts.problem.pictures
        try:
            paths = [draw_run(run.directory.metrics, plots / "run.png")]
            if pictures is not None:
                paths += pictures(run.objective.module, plots)
        except ImportError:
            run.monitor.say("no pictures: matplotlib is not installed; pip install 'dhf[plot]'")
            return []
        except Exception as error:
            run.monitor.say(f"no pictures: {type(error).__name__}: {error}")
            return []
        return paths
