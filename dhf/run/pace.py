"""Pace: each rank's own work and its waiting for others, the rank that the others wait for, and the memory it all takes."""

from __future__ import annotations

import statistics
from typing import Any

from dhf.coordinator import Coordinator
from dhf.memory import peak_memory
from dhf.optim import StepReport

__all__ = ["Pace"]


class Pace:
    """Gathers seconds and memory per rank, step by step. On a GPU with NCCL, queued work counts as the rank's own.

    Args:
        coordinator: How ranks talk.

    Attributes:
        peak_memory_mb: The most that a rank has held at once so far, in 10⁶ bytes: resident memory of the process, or what torch
            has allocated on a GPU.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._totals = [0.0] * coordinator.comm.size
        self.peak_memory_mb = 0.0

    def note(self, report: StepReport) -> dict[str, Any]:
        """A step's seconds of every rank; every rank calls it. Metrics by name, the same on every rank."""
        comm = self._coordinator.comm
        mine = [0.0] * (3 * comm.size)
        mine[comm.rank] = report.seconds - report.seconds_waiting
        mine[comm.size + comm.rank] = report.seconds_waiting
        mine[2 * comm.size + comm.rank] = peak_memory(comm.device) / 1e6
        gathered = self._coordinator.reduce(mine)
        own, waiting, memory = (gathered[i * comm.size : (i + 1) * comm.size] for i in range(3))
        self.peak_memory_mb = round(max(memory), 1)
        self._totals = [total + seconds for total, seconds in zip(self._totals, own, strict=True)]
        return {
            "own_seconds": [round(s, 6) for s in own],
            "waiting_seconds": [round(s, 6) for s in waiting],
            "slowest_rank": own.index(max(own)),
            "peak_memory_mb": self.peak_memory_mb,
        }

    def words(self) -> str:
        """The slowest rank of all steps so far, against the median of the others; empty for one rank."""
        if len(self._totals) < 2:
            return ""
        most = max(self._totals)
        slowest = self._totals.index(most)
        others = statistics.median(t for r, t in enumerate(self._totals) if r != slowest)
        return f"; slowest rank {slowest} with {_seconds(most)} of own work, the others' median {_seconds(others)}"


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 100 else f"{value:.2g} s"
