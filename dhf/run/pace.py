"""Pace: each rank's own work and its waiting for others, and the rank that the others wait for."""

from __future__ import annotations

import statistics
from typing import Any

from dhf.coordinator import Coordinator
from dhf.optim import StepReport

__all__ = ["Pace"]


class Pace:
    """Gathers seconds per rank, step by step. On a GPU with NCCL, queued work counts as the rank's own.

    Args:
        coordinator: How ranks talk.
    """

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator
        self._totals = [0.0] * coordinator.comm.size

    def note(self, report: StepReport) -> dict[str, Any]:
        """A step's seconds of every rank; every rank calls it. Metrics by name, the same on every rank."""
        comm = self._coordinator.comm
        mine = [0.0] * (2 * comm.size)
        mine[comm.rank] = report.seconds - report.seconds_waiting
        mine[comm.size + comm.rank] = report.seconds_waiting
        gathered = self._coordinator.reduce(mine)
        own, waiting = gathered[: comm.size], gathered[comm.size :]
        self._totals = [total + seconds for total, seconds in zip(self._totals, own, strict=True)]
        return {
            "own_seconds": [round(s, 6) for s in own],
            "waiting_seconds": [round(s, 6) for s in waiting],
            "slowest_rank": own.index(max(own)),
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
