"""Saver: a run's checkpoints over all ranks: rank 0 writes and reads, every rank gives and takes its part.

A checkpoint that cannot be written (a full disk) does not end a run: it is said, and tried again. The bytes that a run
resumes from are read once and handed to the other ranks, so they need not see the same disk.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from dhf.comm import Communicator
from dhf.coordinator import Coordinator
from dhf.errors import UsageError
from dhf.optim import HessianFree
from dhf.run.assembly import Parts
from dhf.run.checkpoint import Found, decode, find, forget_after, load_module, save
from dhf.run.config import WATCHING, Config
from dhf.run.directory import RunDirectory
from dhf.run.random_state import capture_random_state, restore_random_state
from dhf.run.schedule import Progress

__all__ = ["Saver", "share"]


class Saver:
    """Writes and reads the checkpoints of one run.

    Args:
        config: The run's settings.
        directory: Where the run is written.
        comm: How ranks talk.
        coordinator: How they agree.
    """

    def __init__(self, config: Config, directory: RunDirectory, comm: Communicator, coordinator: Coordinator) -> None:
        self._config, self._directory, self._comm, self._coordinator = config, directory, comm, coordinator
        self.last_step: int | None = None
        self.notes: list[str] = []

    def settle(self, config: Config) -> None:
        """Write these settings into checkpoints: something that was left open has been decided."""
        self._config = config

    def choose(self) -> tuple[Path, dict[str, Any]] | None:
        """What to go on from, the same on every rank, or None to start anew; ``notes`` tells what a person should know.

        Raises:
            UsageError: If the directory must not be written to, or the checkpoint asked for is not there or is damaged.
        """
        found = self._coordinator.attempt(lambda: self._find() if self._comm.rank == 0 else None)
        path = self._comm.gather_objects(found[0] if found else None)[0]
        if path is None:
            return None
        content = share(self._comm, found[1] if found else None)
        return path, self._coordinator.attempt(lambda: decode(content))

    def restore(self, parts: Parts, path: Path, state: dict[str, Any]) -> None:
        """Put a checkpoint's state into the parts of this rank.

        Raises:
            UsageError: If it is of another model or optimizer.
        """
        phase = parts.phase
        if state["optimizer_name"] != phase.config.optimizer:
            raise UsageError(
                f"{phase.prefix}checkpoint {path} was written with --optimizer {state['optimizer_name']}, "
                f"not {phase.config.optimizer}"
            )
        load_module(parts.problem.objective.module, state["module"], path)
        parts.optimizer.load_state_dict(state["optimizer"])
        own = state["random"][self._comm.rank] if state["world_size"] == self._comm.size else None
        if own is not None:
            restore_random_state(own, self._comm.device)
        self._note_changed_settings(state["config"])
        if path.resolve().parent == self._directory.checkpoints.resolve():
            self.last_step = state["progress"]["step"]

    def go_on_from(self, step: int) -> list[str]:
        """Remove the checkpoints of this directory past the step the run goes on from; their names. Rank 0 calls it."""
        return forget_after(self._directory.checkpoints, step)

    def save(self, parts: Parts, progress: Progress) -> str | None:
        """Write a checkpoint, unless this step's is there; every rank calls it. What went wrong with the disk, or None."""
        if self.last_step == progress.step:
            return None
        if isinstance(parts.optimizer, HessianFree):
            parts.optimizer.consolidate_state_dict()
        random = self._comm.gather_objects(capture_random_state(self._comm.device))
        trouble = self._coordinator.attempt(
            lambda: self._write(parts, progress, random) if self._comm.rank == 0 else None
        )
        trouble = self._comm.gather_objects(trouble)[0]
        if trouble is None:
            self.last_step = progress.step
        return trouble

    def save_alone(self, parts: Parts, progress: Progress) -> str | None:
        """Write a checkpoint without the other ranks, once they are lost; what went wrong with the disk, or None."""
        if self.last_step == progress.step:
            return None
        return self._write(parts, progress, [None] * self._comm.size)

    def _write(self, parts: Parts, progress: Progress, random: list[Any]) -> str | None:
        state = {
            "module": parts.problem.objective.module.state_dict(),
            "optimizer": parts.optimizer.state_dict(),
            "optimizer_name": parts.phase.config.optimizer,
            "progress": dataclasses.asdict(progress),
            "config": dataclasses.asdict(self._config),
            "random": random,
            "world_size": self._comm.size,
        }
        try:
            save(self._directory.checkpoints, progress.step, state, keep=self._config.keep_checkpoints)
        except OSError as error:
            return f"{type(error).__name__}: {error}"
        return None

    def _find(self) -> Found | None:
        """Rank 0's choice among what is on its disk."""
        config, directory = self._config, self._directory
        restarted = self._comm.attempt > 0
        if config.resume == "off" and not restarted:
            if not config.overwrite and not config.dry_run:
                directory.check_free()
            return None
        found, damaged = find(directory.path)
        if config.resume not in ("off", "auto") and not (restarted and found):
            if directory.holds_run() and not _inside(Path(config.resume), directory.path):
                raise UsageError(
                    f"{directory.path} already holds a run, which --resume {config.resume} would mix with another; use another "
                    "--run-dir"
                )
            found, damaged = find(Path(config.resume))
            if found is None and not damaged:
                raise UsageError(
                    f"--resume {config.resume}: there is no checkpoint; give a run directory or a checkpoint folder"
                )
        if damaged and found is None:
            raise UsageError(f"no checkpoint of {directory.path} is whole: {damaged[0]}")
        self.notes += [f"warning: {text}" for text in damaged]
        if damaged and found is not None:
            self.notes.append(f"warning: going on from {found[0]}, the newest that is whole")
        if found is None and directory.holds_run():
            self.notes.append(f"{directory.path} holds no checkpoint: starting at the first step")
        return found

    def _note_changed_settings(self, before: dict[str, Any]) -> None:
        now = dataclasses.asdict(self._config)
        changed = [
            f"--{name.replace('_', '-')} {_shown(before[name])} -> {_shown(now[name])}"
            for name in now
            if name in before and name not in _EXPECTED_TO_CHANGE and before[name] != now[name]
        ]
        if changed:
            self.notes.append(f"settings that the checkpoint was not written with: {', '.join(changed)}")


def share(comm: Communicator, content: bytes | None) -> bytes:
    """Rank 0's bytes, on every rank. Collective."""
    size = comm.gather_objects(len(content or b""))[0]
    buffer = torch.zeros(size, dtype=torch.uint8)
    if content:
        buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    comm.broadcast(buffer)
    return buffer.numpy().tobytes()


_EXPECTED_TO_CHANGE = (
    *("resume", "run_dir", "overwrite", "dry_run", "steps", "time_budget", "threads", "timeout"),
    *WATCHING,
)


def _shown(value: Any) -> str:
    return "(not given)" if value in (None, []) else str(value)


def _inside(path: Path, folder: Path) -> bool:
    return folder.resolve() in (path.resolve(), *path.resolve().parents)
