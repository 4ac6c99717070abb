"""Schedule: where a run stands among its phases, and which clock ends the phase, or the run.

A phase ends with its steps or, where it has a time budget, with that; so the place among the phases is a part of a checkpoint.
Clocks differ between ranks: rank 0's alone is read, and all ranks learn in one and the same collective that time is over.
"""

from __future__ import annotations

import dataclasses
import os
import time

from dhf.coordinator import Coordinator
from dhf.errors import UsageError
from dhf.reason import Reason
from dhf.run.config import Config

__all__ = ["Phase", "Progress", "Schedule"]

_JOB_END_MARGIN = 60.0  # seconds before the end of a SLURM job at which a run stops


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: Steps done; with the seed and the batch size this is also the place in the data.
        failed_steps: Steps without decrease since the last one that had some.
        wall_time: Seconds of training, those before a resume included.
        phase: Which phase it is in, from 1.
        phase_first_step: Steps that were done when the phase began.
        phase_seconds: Seconds of training in the phase, those before a resume included.
    """

    step: int = 0
    failed_steps: int = 0
    wall_time: float = 0.0
    phase: int = 1
    phase_first_step: int = 0
    phase_seconds: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Phase:
    """A part of a run with an optimizer of its own; a run without a list of phases is one phase.

    Attributes:
        number: Counted from 1.
        of: How many there are; 0 for a run without a list.
        config: The run's settings, with the phase's own in their place.
        steps: Most steps that it takes.
        time_budget: Seconds after which it ends, or None.
    """

    number: int
    of: int
    config: Config
    steps: int
    time_budget: float | None

    @property
    def prefix(self) -> str:
        """What stands before a message about this phase."""
        return f"phase {self.number}: " if self.of else ""


class Schedule:
    """The phases of a run, and its deadlines. Every rank calls it alike.

    Args:
        config: The run's settings.
        coordinator: How ranks learn that time is over.

    Attributes:
        phases: All of them.
        phase: The one the run is in.
        first_step: Steps that were done when it began.
        out_of_time: Whether its time budget has ended it.
        job_ends: Whether it is the end of a SLURM job for which the run stops.
    """

    def __init__(self, config: Config, coordinator: Coordinator) -> None:
        self._config, self._coordinator = config, coordinator
        self.phases = _phases(config)
        self.phase, self.first_step = self.phases[0], 0
        self.out_of_time = self.job_ends = False
        self._began = self._entered = time.monotonic()
        self._seconds_before = 0.0
        self._what_ends = ""

    def take_up(self, progress: Progress) -> None:
        """Go on where a checkpoint was written.

        Raises:
            UsageError: If there is no such phase.
        """
        if progress.phase > len(self.phases):
            raise UsageError(
                f"the checkpoint was written in phase {progress.phase}, and this run has {len(self.phases)}; give the "
                "phases that it was written with"
            )
        self.phase, self.first_step = self.phases[progress.phase - 1], progress.phase_first_step
        self._seconds_before = progress.phase_seconds
        budget = self.phase.time_budget
        self.out_of_time = budget is not None and self._seconds_before >= budget

    def settle(self, config: Config) -> None:
        """Go on with settings in which something that was left open has been decided; the phases are the same."""
        self._config, self.phases = config, _phases(config)
        self.phase = self.phases[self.phase.number - 1]

    def start(self) -> None:
        """Start the clocks of the run and of the phase it is in."""
        self._began = self._entered = time.monotonic()
        self._set_deadline()

    def seconds(self) -> float:
        """Seconds of training in the phase so far."""
        return self._seconds_before + time.monotonic() - self._entered

    def later(self) -> list[Phase]:
        """The phases to come that have steps."""
        return [phase for phase in self.phases[self.phase.number :] if phase.steps]

    def is_over(self, step: int) -> bool:
        """Whether the phase has ended, after so many steps of the run."""
        return self.out_of_time or step >= self.first_step + self.phase.steps

    def leave(self) -> None:
        """Stop the phase's clock, lest it end what comes after."""
        self._set_deadline(of_phase=False)

    def enter(self, phase: Phase, step: int) -> None:
        """Begin a phase after so many steps of the run."""
        self.phase, self.first_step = phase, step
        self.out_of_time, self._seconds_before = False, 0.0
        self._entered = time.monotonic()
        self._set_deadline()

    def ended(self, step: int) -> Reason | None:
        """Why there is nothing left to do, or None."""
        most = self._config.steps
        if most is not None and step >= most:
            return Reason.STEPS_DONE
        if not self.is_over(step) or self.later():
            return None
        return Reason.TIME_LIMIT if step < self.first_step + self.phase.steps else Reason.STEPS_DONE

    def stopping(self) -> Reason | None:
        """Why the ranks stop: a signal, or the run's time; where it is the phase's time, that is noted, and they go on."""
        reason = self._coordinator.stopping
        if reason is not Reason.TIME_LIMIT:
            return reason
        # the ranks' clocks may tell different deadlines to be the first: rank 0's word holds
        what_ends = self._coordinator.comm.gather_objects(self._what_ends)[0]
        if what_ends != "phase":
            self.job_ends = what_ends == "job"
            return reason
        self.out_of_time = True
        self._coordinator.stopping = None
        self.leave()
        return None

    def words(self) -> str:
        """The phase in words."""
        phase, most = self.phase, self._config.steps
        steps = phase.steps if most is None else min(phase.steps, most - self.first_step)
        cut = "" if steps == phase.steps else f" of {phase.steps}"
        budget = "" if phase.time_budget is None else f" or {phase.time_budget:g} s"
        return f"phase {phase.number} of {phase.of}: {phase.config.optimizer}, {steps}{cut} steps{budget}"

    def _set_deadline(self, *, of_phase: bool = True) -> None:
        """The end of the run's time budget, of the SLURM job or of the phase's budget, whichever comes first."""
        budget, job_end = self._config.time_budget, os.environ.get("SLURM_JOB_END_TIME", "")
        deadlines = []
        if budget is not None:
            deadlines.append((self._began + budget, "run"))
        if job_end.isdigit():
            deadlines.append((time.monotonic() + int(job_end) - time.time() - _JOB_END_MARGIN, "job"))
        if of_phase and self.phase.time_budget is not None:
            deadlines.append((self._entered + self.phase.time_budget - self._seconds_before, "phase"))
        self._coordinator.deadline, self._what_ends = min(deadlines, default=(None, ""))


def _phases(config: Config) -> list[Phase]:
    """The phases of a run; without a list, the run itself is one."""
    if not config.phases:
        assert config.steps is not None
        return [Phase(1, 0, config, config.steps, None)]
    phases = []
    for number, settings in enumerate(config.phases, 1):
        own = dataclasses.replace(config, phases=[], **settings)
        phases.append(Phase(number, len(config.phases), own, settings["steps"], settings.get("time_budget")))
    return phases
