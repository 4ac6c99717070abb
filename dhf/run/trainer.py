"""Trainer: one run, from the configuration to its result: the rooms wired together, the loop over steps, and the end."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Mapping
from typing import Any

import torch

from dhf.comm import Communicator
from dhf.coordinator import Coordinator, capture
from dhf.curvature import NonFinite, places_in_words
from dhf.errors import CommunicationError, NonFiniteError, UsageError
from dhf.evaluation import dropping
from dhf.operator import loss_and_gradient
from dhf.optim import HessianFree, StepReport
from dhf.parameters import Parameters
from dhf.phases import Phases
from dhf.reason import Reason
from dhf.run.assembly import Parts, assemble, for_phase
from dhf.run.closing import Ending, sum_up, write_result
from dhf.run.config import Config, idle_settings, to_yaml
from dhf.run.directory import RunDirectory, default_directory
from dhf.run.dry_run import in_lines, measure
from dhf.run.events import require_tensorboard
from dhf.run.metrics import extra_metrics, step_row
from dhf.run.micro_batches import choose_size, settled, written_size
from dhf.run.monitor import Monitor
from dhf.run.outcome import EXIT_DONE, EXIT_RANKS, SHARED, exit_code, explain, reason_of, speaker
from dhf.run.pace import Pace
from dhf.run.preflight import require_same_problem, require_same_settings
from dhf.run.profile import ProfileTotals
from dhf.run.recorder import Recorder
from dhf.run.saver import Saver
from dhf.run.schedule import Phase, Progress, Schedule
from dhf.run.signals import StopSignals

__all__ = ["Trainer"]

_FAILED_STEPS = 20
_LEAVING = 60.0  # seconds that the ranks wait for the one that writes and draws


class Trainer:
    """One run: its loop, and its end."""

    parts: Parts

    def __init__(self, config: Config, comm: Communicator, stop: StopSignals) -> None:
        self.config, self.comm, self.stop = config, comm, stop
        self.leads = comm.rank == 0
        self.coordinator = Coordinator(comm, interrupted=stop, phases=Phases(comm.device, active=config.profile))
        self.schedule = Schedule(config, self.coordinator)
        self.monitor = Monitor(
            self.leads, f"{config.problem} on {comm.size} rank(s)", iterations=config.monitor == "cg"
        )
        self.pace, self.profile = Pace(self.coordinator), ProfileTotals(self.coordinator)
        self.recorder: Recorder | None = None
        self._notes_said = 0
        self.fallbacks: collections.Counter[str] = collections.Counter()
        self.claimed = self.factorised = self._save_is_due = False
        self.first_step = self.step = self.failed_steps = self.products = self.product_steps = 0
        self.product_seconds = 0.0
        self.loss = self.first_loss = float("nan")
        self.wall_before = 0.0
        self.began = time.monotonic()

    def execute(self) -> int:
        """Set up, train, and write the result, whatever the end."""
        failure: Exception | None = None
        try:
            ended = self._ended_before()
            if ended is not None:
                return ended
            self.set_up()
            if self.config.dry_run:
                return self.dry_run()
            reason = self.train()
        except Exception as error:
            failure, reason = error, reason_of(error, at_start=self.step == self.first_step)
        if isinstance(failure, NonFiniteError) and failure.places:
            failure = NonFiniteError(f"{failure}{self._found_in_the_data(failure.places, self.step)}")
        return self._end(reason, failure)

    def set_up(self) -> None:
        """Build the problem and the optimizer on every rank, check them on the data, and take the run directory."""
        config = self.config
        require_same_settings(self.coordinator, config)
        if config.tensorboard:
            self.coordinator.attempt(require_tensorboard)
        path = (
            self.comm.remember("run-dir", config.run_dir or default_directory(config.problem)) if self.leads else None
        )
        self.directory = RunDirectory(self.comm.gather_objects(path)[0])
        self.saver = Saver(config, self.directory, self.comm, self.coordinator)
        self._say_hello()
        checkpoint = self.saver.choose()
        if checkpoint is not None:
            self._take_up(Progress(**checkpoint[1]["progress"]))
        self.parts = self.coordinator.attempt(
            lambda: assemble(self.schedule.phase, self.schedule.later(), self.comm, self.coordinator)
        )
        self.objective = self.parts.problem.objective
        require_same_problem(self.coordinator, self.objective, self.parts.train, self.parts.validation)
        self._settle_micro_batches(None if checkpoint is None else checkpoint[1]["config"])
        config = self.config
        if checkpoint is not None:
            self.coordinator.attempt(lambda: self.saver.restore(self.parts, *checkpoint))
        self._say_where_it_starts(checkpoint)
        self._warn_of_empty_shards()
        self._warn_of_what_changes_nothing_or_too_much()
        batches = self.coordinator.attempt(lambda: self.parts.train.batches(self.step))
        self.first_loss, _ = loss_and_gradient(
            self.objective, batches, coordinator=self.coordinator, debug_nonfinite=config.debug_nonfinite
        )
        self.loss = self.first_loss
        if not config.dry_run:
            self.coordinator.attempt(lambda: self._claim(resumed=checkpoint is not None))
            self.claimed = True

    def train(self) -> Reason:
        """Take steps until there is a reason to stop."""
        self.began = time.monotonic()
        self.schedule.start()
        self.monitor.say(f"start: loss {self.first_loss:.6g}, {self._sizes()}")
        self._begin_phase()
        self.monitor.start()
        try:
            reason = self._ended()
            while reason is None:
                if self.schedule.is_over(self.step):
                    self._next_phase()
                reason = self._one_step()
        finally:
            self.monitor.stop()
            if self.recorder is not None:
                self.recorder.close()
        trouble = self.saver.save(self.parts, self._progress())
        if trouble is not None:
            self.monitor.say(f"error: the last checkpoint was not written: {trouble}")
            return Reason.NOT_SAVED
        return reason

    def dry_run(self) -> int:
        """Say what a run would need, in each of its phases."""
        self._say_phase()
        self._say_needs()
        while self.schedule.later():
            self._next_phase()
            self._say_needs()
        return EXIT_DONE

    def _say_needs(self) -> None:
        train, ranks_here = self.parts.train, self.coordinator.ranks_here()
        needs = self.coordinator.attempt(
            lambda: measure(self.objective, train.batches(self.step), self.parts.optimizer, ranks_here)
        )
        for line in in_lines(self.comm.gather_objects(needs), train, self._dtype()):
            self.monitor.say(line)

    def _settle_micro_batches(self, written: dict[str, Any] | None) -> None:
        """Decide the micro-batch sizes that were left to measurement: by the checkpoint or an earlier attempt, if any."""
        sizes: dict[int, int] = {}
        for phase in [self.schedule.phase, *self.schedule.later()]:
            if phase.config.micro_batch_size != "auto":
                continue
            name = f"micro-batch-size-{phase.number}"
            before = self.comm.remember(name, "") if self.leads else ""
            size = written_size(written, phase.number) or int(self.comm.gather_objects(before)[0] or 0)
            if not size:
                parts = self.parts if phase is self.schedule.phase else self._parts_of(phase)
                size, note = choose_size(parts, self.coordinator, self.step)
                self.monitor.say(f"{phase.prefix}{note}")
                if self.leads:
                    self.comm.remember(name, str(size))
            sizes[phase.number] = size
        if sizes:
            self.config = settled(self.config, sizes)
            self.schedule.settle(self.config)
            self.saver.settle(self.config)
            self.parts = self._parts_of(self.schedule.phase)

    def _parts_of(self, phase: Phase) -> Parts:
        return self.coordinator.attempt(lambda: for_phase(self.parts.problem, phase, self.comm, self.coordinator))

    def _next_phase(self) -> None:
        """Go on with the next phase: its batches, and its optimizer from the start."""
        before, steps = self.schedule.phase, self.step - self.schedule.first_step
        early = f" ({before.prefix}out of time after {steps} steps)" if self.schedule.out_of_time else ""
        self.schedule.leave()
        following = self.schedule.later()[0]
        self.parts = self._parts_of(following)
        self.schedule.enter(following, self.step)
        self.failed_steps = self._notes_said = 0
        self._begin_phase(early)
        self._warn_of_empty_shards()

    def _one_step(self) -> Reason | None:
        batches = self.coordinator.attempt(lambda: self.parts.train.batches(self.step))
        report = self.parts.optimizer.step(batches)
        if report.reason in (Reason.INTERRUPTED, Reason.TIME_LIMIT):
            return self._ended()  # the step was not taken
        self.step += 1
        self.loss = report.loss_after
        if report.products:
            self.products += report.products
            self.product_steps += 1
            self.product_seconds += report.seconds
        self.factorised |= report.solve is not None and not report.products
        self.failed_steps = self.failed_steps + 1 if report.reason is Reason.NO_DECREASE else 0
        self._record(report)
        every = self.config.checkpoint_every
        self._save_is_due |= bool(every) and self.step % every == 0
        if self._save_is_due:
            self._save_on_the_way()
        if report.reason is Reason.GRADIENT_ZERO:
            return Reason.GRADIENT_ZERO
        if self.failed_steps >= _FAILED_STEPS and report.non_finite:
            return Reason.DIVERGED
        return self._ended()

    def _ended(self) -> Reason | None:
        stopping = self.schedule.stopping()
        target = self.config.target_loss
        if self.step > self.first_step and target is not None and self.loss <= target:
            return Reason.TARGET_REACHED
        ended = self.schedule.ended(self.step)
        if ended is not None:
            return ended
        return Reason.NO_DECREASE if self.failed_steps >= _FAILED_STEPS else stopping

    def _record(self, report: StepReport) -> None:
        self._say_what_was_chosen()
        if report.fallback:
            self.fallbacks[report.fallback] += 1
        row = {
            **step_row(self.step, self.parts.phase, report),
            **self.pace.note(report),
            **self.profile.note(report),
        }
        if report.non_finite:
            ranks = places_in_words(report.non_finite)
            found = self._found_in_the_data(report.non_finite, self.step - 1)
            self.monitor.say(f"warning: step {self.step}: a product is not finite, from {ranks}{found}")
        try:
            extra = extra_metrics(self.parts, self.coordinator, row)
        except Exception:
            self._show(row, {}, report)  # the step was taken, whatever its metrics
            raise
        self._show(row, extra, report)

    def _show(self, row: dict[str, Any], extra: dict[str, float], report: StepReport) -> None:
        if self.recorder is not None:  # on the rank that leads
            self.recorder.step({**row, **extra}, report, self.schedule.first_step)
            self.monitor.step(row, extra)

    def _found_in_the_data(self, places: Mapping[int, NonFinite | None], step: int) -> str:
        """The samples from which NaN or infinity came, by their index in the data; or how to have them looked for."""
        if not self.config.debug_nonfinite:
            return "; --debug-nonfinite finds the sample"
        found = ""
        for rank, place in places.items():
            if place is not None and place.row is not None:
                index = self.parts.train.place(step, rank, place.micro_batch, place.row)
                found += f"; of rank {rank} it is sample {index} of the data"
        return found

    def _ended_before(self) -> int | None:
        """The exit code of an earlier attempt of this launch that ended for good, which a restart would only repeat."""
        if self.comm.attempt == 0:
            return None
        code = self.comm.gather_objects(self.comm.remember("ended", "") if self.leads else None)[0]
        if not code:
            return None
        self.monitor.say(f"attempt {self.comm.attempt + 1}: an earlier attempt ended for good with exit code {code}")
        return int(code)

    def _take_up(self, progress: Progress) -> None:
        self.step = self.first_step = progress.step
        self.failed_steps, self.wall_before = progress.failed_steps, progress.wall_time
        self.schedule.take_up(progress)

    def _claim(self, *, resumed: bool) -> None:
        if not self.leads:
            return
        try:
            self.directory.claim(to_yaml(self.config), resumed_step=self.step if resumed else None)
        except OSError as error:
            raise UsageError(
                f"the run directory {self.directory.path} cannot be written: {error}; use another --run-dir"
            ) from None
        removed = self.saver.go_on_from(self.step) if resumed else []
        if removed:
            self.monitor.say(f"removed the checkpoints of the course that is left: {', '.join(removed)}")
        self.recorder = Recorder(self.directory, self.config, self.step, self.monitor.say)

    def _progress(self) -> Progress:
        return Progress(
            self.step,
            self.failed_steps,
            self.wall_before + time.monotonic() - self.began,
            self.schedule.phase.number,
            self.schedule.first_step,
            self.schedule.seconds(),
        )

    def _save_on_the_way(self) -> None:
        trouble = self.saver.save(self.parts, self._progress())
        self._save_is_due = trouble is not None
        if trouble is not None:
            last = self.saver.last_step
            kept = "there is none yet" if last is None else f"the newest is step-{last}"
            self.monitor.say(
                f"warning: the checkpoint of step {self.step} was not written ({kept}), and is tried again: {trouble}"
            )

    def _end(self, reason: Reason, failure: Exception | None) -> int:
        """Save what can be saved, write the result, and say how it went; the exit code."""
        together = failure is None or self.comm.size == 1 or isinstance(failure, SHARED)
        # where the others do not notice that this rank leaves, nobody but it can tell
        last_words = not together and not self.comm.notices and not isinstance(failure, CommunicationError)
        speaks = last_words or self.comm.rank == speaker(failure)
        if failure is not None:
            explain(failure, speaks=speaks)
            if self.claimed and self.step > self.first_step:
                self._save_after(failure, speaks=speaks, together=together)
        code = exit_code(
            reason,
            target_missed=self.config.error_if_not_converged and reason is not Reason.TARGET_REACHED,
            job_ends=self.schedule.job_ends,
        )
        ending = self._ending(reason, code, failure)
        if speaks and self.claimed:
            self.monitor.visible = True  # also where it is not rank 0 that is left
            write_result(ending, self.directory, self.monitor)
        if speaks and code != EXIT_RANKS:
            with contextlib.suppress(CommunicationError):
                self.comm.remember("ended", str(code))
        self.stop.settle(code)
        if speaks and self.claimed:
            sum_up(ending, self.directory, self.monitor, self.parts.problem)
        if together:
            # a rank that leaves first would have the launcher end the others
            with contextlib.suppress(CommunicationError):
                self.comm.barrier(timeout=min(_LEAVING, self.config.timeout))
        else:
            self.comm.abandon(code, patience=0.0 if speaks else _LEAVING)
        return code

    def _ending(self, reason: Reason, code: int, failure: Exception | None) -> Ending:
        return Ending(
            reason,
            code,
            failure,
            self._failed_rank(failure),
            self.step,
            self.step - self.first_step,
            self.first_loss,
            self.loss,
            self.config.target_loss,
            time.monotonic() - self.began,
            self.wall_before,
            self.products,
            self.product_steps,
            self.product_seconds,
            self.factorised,
            self.comm.size,
            self.pace.words(),
            self.pace.peak_memory_mb,
            dict(self.fallbacks),
            self.profile if self.config.profile else None,
        )

    def _failed_rank(self, failure: Exception | None) -> int | None:
        if failure is None or isinstance(failure, (*SHARED, CommunicationError)):
            return getattr(failure, "rank", None)
        return self.comm.rank

    def _save_after(self, failure: Exception, *, speaks: bool, together: bool) -> None:
        """A failed step has left the parameters at its start: what the steps before it have reached is saved."""
        if together:
            trouble, error = capture(lambda: self.saver.save(self.parts, self._progress()))
            trouble = trouble or (None if error is None else str(error))
        elif speaks and not (isinstance(failure, CommunicationError) and not failure.survivors):
            trouble = self.saver.save_alone(self.parts, self._progress())
        else:
            return
        if trouble is not None and speaks:
            self.monitor.say(f"warning: step {self.step} could not be saved: {trouble}")

    def _say_hello(self) -> None:
        self.monitor.say(
            f"dhf: {self.config.problem}, {self.comm.size} rank(s) over {self.comm.backend} on {self.comm.device.type}, "
            f"{torch.get_num_threads()} thread(s) each, torch {torch.__version__}"
        )

    def _begin_phase(self, early: str = "") -> None:
        self._say_phase(early)
        if isinstance(self.parts.optimizer, HessianFree) and self.config.monitor == "cg" and self.leads:
            self.parts.optimizer.on_iteration = self.monitor.iteration

    def _say_phase(self, early: str = "") -> None:
        if self.schedule.phase.of:
            self.monitor.say(f"{self.schedule.words()}, batch {self.parts.train.batch_size:,}{early}")
        self._say_what_was_chosen()

    def _say_what_was_chosen(self) -> None:
        """The optimizer's choices as they become known."""
        notes = getattr(self.parts.optimizer, "notes", [])
        for note in notes[self._notes_said :]:
            self.monitor.say(note)
        self._notes_said = len(notes)

    def _dtype(self) -> str:
        return str(Parameters(self.objective.module).dtype).removeprefix("torch.")

    def _say_where_it_starts(self, checkpoint: tuple[Any, dict[str, Any]] | None) -> None:
        for note in self.saver.notes:
            self.monitor.say(note)
        attempt = f"attempt {self.comm.attempt + 1}: " if self.comm.attempt else ""
        if checkpoint is not None:
            path, state = checkpoint
            self.monitor.say(
                f"{attempt}resumed at step {self.step} from {path} (written by {state['world_size']} rank(s))"
            )
        elif attempt:
            self.monitor.say(f"{attempt}there is no checkpoint yet; starting at step 0")

    def _warn_of_empty_shards(self) -> None:
        train = self.parts.train
        empty = [rank for rank, size in enumerate(train.sizes()) if size == 0]
        if empty:
            self.monitor.say(
                f"warning: {train.batch_size} samples for {self.comm.size} ranks: rank "
                f"{', '.join(map(str, empty))} has none; use --nproc_per_node={train.batch_size} or more data"
            )

    def _warn_of_what_changes_nothing_or_too_much(self) -> None:
        for words in idle_settings(self.config):
            self.monitor.say(f"warning: {words}")
        dropout = dropping(self.objective.module)
        if dropout:
            self.monitor.say(
                f"warning: dropout is on in submodule {dropout[0]!r}: its mask is held for a step, and every step minimises "
                "another function; call module.eval() before the problem is returned, or use p=0"
            )

    def _sizes(self) -> str:
        n, train = Parameters(self.objective.module).numel, self.parts.train
        sizes = ", ".join(map(str, train.sizes()))
        return f"{n:,} parameters in {self._dtype()}, {train.batch_size:,} samples a step ({sizes} per rank)"
