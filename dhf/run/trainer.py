"""Trainer: one run, from the configuration to its result: the rooms wired together, the loop over steps, and the end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dhf.errors import UsageError
from dhf.reason import Reason
from dhf.run.config import Config, to_yaml
from dhf.run.outcome import EXIT_DONE, exit_code, explain, reason_of

if TYPE_CHECKING:
    from dhf.comm import Communicator
    from dhf.coordinator import Coordinator
    from dhf.optim import FirstOrder, HessianFree, StepReport
    from dhf.problems import Problem, Shard
    from dhf.run.directory import RunDirectory
    from dhf.run.monitor import Monitor
    from dhf.run.signals import StopSignals

__all__ = ["Trainer"]

_FAILED_STEPS = 20


class Trainer:
    """One run: its rooms wired together, its loop, and its end."""

    directory: RunDirectory
    problem: Problem
    optimizer: HessianFree | FirstOrder
    shard: Shard
    validation: Shard | None
    monitor: Monitor

    def __init__(self, config: Config, comm: Communicator, stop: StopSignals) -> None:
        from dhf.coordinator import Coordinator

        self.config, self.comm, self.stop = config, comm, stop
        self.leads = comm.rank == 0
        self.coordinator: Coordinator = Coordinator(comm, interrupted=stop)
        self.claimed = False
        self.first_step = self.step = self.failed_steps = 0
        self.loss = self.first_loss = float("nan")
        self.products = 0
        self.wall_before = 0.0
        self.began = time.monotonic()

    def execute(self) -> int:
        """Set up, train, and write the result, whatever the end."""
        failure: Exception | None = None
        try:
            self.set_up()
            if self.config.dry_run:
                return self.dry_run()
            reason = self.train()
        except Exception as error:
            failure, reason = error, reason_of(error, at_start=self.step == self.first_step)
        code = exit_code(
            reason, target_missed=self.config.error_if_not_converged and reason is not Reason.TARGET_REACHED
        )
        self._finish(reason, code, failure)
        return code

    def set_up(self) -> None:
        """Build the problem and the optimizer on every rank, check them on the data, and take the run directory."""
        from dhf.operator import loss_and_gradient
        from dhf.run.directory import RunDirectory, default_directory
        from dhf.run.monitor import Monitor

        config = self.config
        path = self.comm.gather_objects(config.run_dir or default_directory(config.problem))[0]
        self.directory = RunDirectory(path)
        self.monitor = Monitor(self.leads, f"{config.problem} on {self.comm.size} rank(s)")
        self._say_hello()
        checkpoint = self._find_checkpoint()
        self.coordinator.attempt(self._build)
        if checkpoint is not None:
            self.coordinator.attempt(lambda: self._resume(checkpoint))
        self._warn_of_empty_shards()
        batches = self.coordinator.attempt(lambda: self.shard.batches(self.step))
        self.first_loss, _ = loss_and_gradient(self.problem.objective, batches, coordinator=self.coordinator)
        self.loss = self.first_loss
        if self.leads and not config.dry_run:
            self.directory.claim(to_yaml(config), resumed_step=self.step if checkpoint is not None else None)
        self.claimed = not config.dry_run

    def train(self) -> Reason:
        """Take steps until there is a reason to stop."""
        self.began = time.monotonic()
        self.coordinator.deadline = None if self.config.time_budget is None else self.began + self.config.time_budget
        self.monitor.say(f"start: loss {self.first_loss:.6g}, {self._sizes()}")
        self.monitor.start()
        try:
            reason = self._ended()
            while reason is None:
                reason = self._one_step()
        finally:
            self.monitor.stop()
        self._save()
        return reason

    def dry_run(self) -> int:
        """Say what a run would need."""
        from dhf.run.dry_run import measure

        build, config = _graph_builder(self.config), self.config
        needs = self.coordinator.attempt(
            lambda: measure(self.problem.objective, self.shard.batches(self.step), build, config.cg_max_iterations)
        )
        everyone = self.comm.gather_objects(needs)
        largest = max(everyone, key=lambda n: n.graph_bytes)
        lines = [
            f"parameters          {needs.parameters:,} ({config.dtype})",
            f"samples per step    {self.shard.batch_size:,} of {self.shard.samples:,}",
            f"shards per rank     {', '.join(f'{n.samples:g}' for n in everyone)}",
            f"micro-batches       {', '.join(str(n.micro_batches) for n in everyone)}",
            f"products per step   at most {config.cg_max_iterations + 2} (CG, start and true residual), one collective each",
            f"retained graphs     {largest.graph_bytes / 2**20:,.1f} MiB on the fullest rank",
            f"vectors             {needs.vector_bytes / 2**20:,.1f} MiB on every rank",
        ]
        for line in lines:
            self.monitor.say(line)
        return EXIT_DONE

    def _one_step(self) -> Reason | None:
        batches = self.coordinator.attempt(lambda: self.shard.batches(self.step))
        report = self.optimizer.step(batches)
        if report.reason in (Reason.INTERRUPTED, Reason.TIME_LIMIT):
            return report.reason  # the step was not taken
        self.step += 1
        self.loss = report.loss_after
        self.products += report.products
        self.failed_steps = self.failed_steps + 1 if report.reason is Reason.NO_DECREASE else 0
        self._record(report)
        every = self.config.checkpoint_every
        if every and self.step % every == 0:
            self._save()
        return Reason.GRADIENT_ZERO if report.reason is Reason.GRADIENT_ZERO else self._ended()

    def _ended(self) -> Reason | None:
        target = self.config.target_loss
        if self.step > self.first_step and target is not None and self.loss <= target:
            return Reason.TARGET_REACHED
        if self.step >= self.config.steps:
            return Reason.STEPS_DONE
        return Reason.NO_DECREASE if self.failed_steps >= _FAILED_STEPS else self.coordinator.stopping

    def _record(self, report: StepReport) -> None:
        extra = self._extra_metrics()
        if not self.leads:
            return
        row = dataclasses.asdict(dataclasses.replace(report, solve=None))
        del row["solve"]
        solve = report.solve
        row = {
            "step": self.step,
            **row,
            "reason": report.reason.name,
            "cg_iterations": solve.iterations if solve else 0,
            "cg_reason": solve.reason.name if solve else None,
            "cg_residual_norm": solve.residual_norm if solve else None,
            "cg_true_residual_norm": solve.true_residual_norm if solve else None,
            **extra,
        }
        self.directory.append(row)
        self.monitor.step(row, extra)

    def _extra_metrics(self) -> dict[str, float]:
        """The problem's own numbers, taken on rank 0, and the loss on held-out data, over all ranks."""
        from dhf.evaluation import evaluate, micro_batch_seeds

        problem, extra = self.problem, {}
        if problem.metrics is not None:
            taken = self.coordinator.attempt(
                lambda: dict(problem.metrics(problem.objective.module)) if self.leads and problem.metrics else {}
            )
            extra = {name: float(value) for name, value in taken.items()}
        if self.validation is not None:
            held_out = self.validation
            sums = self.coordinator.attempt(
                lambda: evaluate(
                    problem.objective,
                    self.comm.device,
                    held_out.batches(0),
                    micro_batch_seeds(0, self.comm.rank, len(held_out.batches(0))),
                )
            )
            total, count = self.coordinator.reduce(sums)
            extra["validation_loss"] = total / count
        return extra

    def _build(self) -> None:
        """The problem from the seed, the same on every rank, and what trains it."""
        import torch

        from dhf.problems import Shard, build_problem

        config, comm = self.config, self.comm
        torch.set_flush_denormal(True)  # denormal inputs make gradients on CPUs an order of magnitude slower
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        dtype = getattr(torch, config.dtype)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        torch.manual_seed(config.seed)
        try:
            self.problem = build_problem(config.problem, config.options)
        finally:
            torch.set_default_dtype(before)
        objective = self.problem.objective
        objective.module.to(device=comm.device, dtype=dtype)
        if config.weight_decay is not None:
            objective.weight_decay = config.weight_decay
        shard = functools.partial(
            Shard,
            rank=comm.rank,
            size=comm.size,
            device=comm.device,
            dtype=dtype,
            micro_batch_size=config.micro_batch_size,
        )
        self.shard = shard(self.problem.train, batch_size=config.batch_size, seed=config.seed)
        self.validation = None if self.problem.validation is None else shard(self.problem.validation)
        self.optimizer = _optimizer(config, objective, self.coordinator)

    def _find_checkpoint(self) -> Path | None:
        """The checkpoint to go on from, chosen by rank 0; refuses a directory that must not be written to."""
        from dhf.run.checkpoint import find

        def choose() -> Path | None:
            resume = self.config.resume
            if not self.leads:
                return None
            if resume == "off":
                if not self.config.overwrite and not self.config.dry_run:
                    self.directory.check_free()
                return None
            found = find(self.directory.path if resume == "auto" else Path(resume))
            if found is None and resume != "auto":
                raise UsageError(
                    f"--resume {resume}: there is no checkpoint; give a run directory or a checkpoint folder"
                )
            if found is None and self.directory.metrics.exists() and self.directory.metrics.stat().st_size:
                self.monitor.say(f"{self.directory.path} holds no checkpoint: starting at the first step")
            return found

        chosen = self.coordinator.attempt(choose)
        return self.comm.gather_objects(chosen)[0]

    def _resume(self, path: Path) -> None:
        from dhf.run.checkpoint import load, load_module

        state = load(path)
        if state["optimizer_name"] != self.config.optimizer:
            raise UsageError(
                f"checkpoint {path} was written with --optimizer {state['optimizer_name']}, not {self.config.optimizer}"
            )
        load_module(self.problem.objective.module, state["module"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = self.first_step = state["step"]
        self.failed_steps, self.wall_before = state["failed_steps"], state["wall_time"]
        self.monitor.say(f"resumed at step {self.step} from {path} (written by {state['world_size']} rank(s))")

    def _save(self) -> None:
        from dhf.run.checkpoint import save

        state = {
            "module": self.problem.objective.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "optimizer_name": self.config.optimizer,
            "step": self.step,
            "failed_steps": self.failed_steps,
            "wall_time": self._wall_time(),
            "world_size": self.comm.size,
        }
        self.coordinator.attempt(lambda: save(self.directory.checkpoints, self.step, state) if self.leads else None)

    def _finish(self, reason: Reason, code: int, failure: Exception | None) -> None:
        """Write result.json and the pictures, and say in five lines how it went."""
        wall = time.monotonic() - self.began
        if failure is not None:
            explain(failure, self.leads)
        if not self.leads or not self.claimed:
            return
        with contextlib.suppress(OSError):
            self.directory.write_result(
                {
                    "reason": reason.name,
                    "exit_code": code,
                    "steps": self.step,
                    "loss": self.loss,
                    "wall_time": self.wall_before + wall,
                    "world_size": self.comm.size,
                    "products": self.products,
                    "failed_rank": getattr(failure, "rank", None),
                    "error": None if failure is None else str(failure),
                }
            )
        pictures = self._draw() if self.step > self.first_step else []
        steps = self.step - self.first_step
        say = self.monitor.say
        say(f"ended    {reason.words}: {reason.advice}")
        say(f"loss     {self.first_loss:.6g} -> {self.loss:.6g} in {steps} steps{self._toward_target()}")
        say(f"time     {wall:.1f} s of training, {wall / max(steps, 1):.2f} s a step")
        say(
            f"products {self.products:,}, {self.products / max(steps, 1):.0f} on each step's graphs (built once), "
            f"{self.products / max(wall, 1e-9):.0f} a second on {self.comm.size} rank(s)"
        )
        say(f"written  {self.directory.path}" + "".join(f"\n         {path}" for path in pictures))

    def _draw(self) -> list[Path]:
        """The run's pictures; a missing matplotlib or a fault in drawing never changes how a run ended."""
        from dhf.run.plot import draw_run

        try:
            paths = [draw_run(self.directory.metrics, self.directory.plots / "run.png")]
            if self.problem.pictures is not None:
                paths += self.problem.pictures(self.problem.objective.module, self.directory.plots)
        except ImportError:
            self.monitor.say("no pictures: matplotlib is not installed; pip install 'dhf[plot]'")
            return []
        except Exception as error:
            self.monitor.say(f"no pictures: {type(error).__name__}: {error}")
            return []
        return paths

    def _say_hello(self) -> None:
        import torch

        threads = torch.get_num_threads()
        self.monitor.say(
            f"dhf: {self.config.problem}, {self.comm.size} rank(s) over {self.comm.backend} on {self.comm.device.type}, "
            f"{threads} thread(s) each, {self.config.dtype}, torch {torch.__version__}"
        )

    def _warn_of_empty_shards(self) -> None:
        empty = [rank for rank, size in enumerate(self.shard.sizes()) if size == 0]
        if empty:
            self.monitor.say(
                f"warning: {self.shard.batch_size} samples for {self.comm.size} ranks: rank "
                f"{', '.join(map(str, empty))} has none; use --nproc_per_node={self.shard.batch_size} or more data"
            )

    def _sizes(self) -> str:
        from dhf.parameters import Parameters

        n = Parameters(self.problem.objective.module).numel
        return f"{n:,} parameters, {self.shard.batch_size:,} samples a step ({', '.join(map(str, self.shard.sizes()))} per rank)"

    def _toward_target(self) -> str:
        target = self.config.target_loss
        return "" if target is None else f" (target {target:g})"

    def _wall_time(self) -> float:
        return self.wall_before + time.monotonic() - self.began


def _optimizer(config: Config, objective: Any, coordinator: Coordinator) -> HessianFree | FirstOrder:
    from dhf.optim import FirstOrder, HessianFree

    if config.optimizer != "hf":
        return FirstOrder(
            objective,
            coordinator,
            method=config.optimizer,
            learning_rate=config.learning_rate,
            seed=config.seed,
        )
    return HessianFree(
        objective,
        coordinator=coordinator,
        curvature=config.curvature,
        preconditioner=config.preconditioner,
        solver=config.solver,
        damping=config.damping,
        cg_max_iterations=config.cg_max_iterations,
        cg_rtol=config.cg_rtol,
        curvature_fraction=config.curvature_fraction,
        seed=config.seed,
    )


def _graph_builder(config: Config) -> Any:
    from dhf.curvature import FisherGraph, GaussNewtonGraph, GradientGraph, HessianGraph

    if config.optimizer != "hf":
        return GradientGraph
    return {"ggn": GaussNewtonGraph, "hessian": HessianGraph, "fisher": FisherGraph}[config.curvature]
