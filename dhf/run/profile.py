"""ProfileTotals: where the time of a run goes, phase by phase, over all ranks; which rank each phase waits for."""

from __future__ import annotations

import dataclasses
from typing import Any

from dhf.coordinator import Coordinator
from dhf.optim import StepReport
from dhf.phases import PHASES

__all__ = ["ProfileTotals"]


@dataclasses.dataclass
class ProfileTotals:
    """Gathers each step's profile from all ranks.

    Args:
        coordinator: How ranks talk; its phases are measured.
    """

    coordinator: Coordinator

    def __post_init__(self) -> None:
        self._by_rank = {name: [0.0] * self.coordinator.comm.size for name in PHASES}
        self._steps = self._products = self._collectives = self._bytes = 0
        self._seconds = 0.0

    def note(self, report: StepReport) -> dict[str, Any]:
        """A step's seconds by phase, one per rank; every rank calls it. Metrics by name, the same on every rank."""
        comm, profile = self.coordinator.comm, report.profile
        if profile is None:
            return {}
        mine = [0.0] * (comm.size * len(PHASES))
        for i, name in enumerate(PHASES):
            mine[i * comm.size + comm.rank] = profile.seconds[name]
        gathered = self.coordinator.reduce(mine)
        phases = {
            name: [round(s, 6) for s in gathered[i * comm.size : (i + 1) * comm.size]] for i, name in enumerate(PHASES)
        }
        for name, seconds in phases.items():
            self._by_rank[name] = [a + b for a, b in zip(self._by_rank[name], seconds, strict=True)]
        self._steps += 1
        self._seconds += report.seconds
        self._products += report.products
        self._collectives += profile.collectives
        self._bytes += profile.bytes_reduced
        return {
            "phase_seconds": phases,
            "products_per_second": _rate(report.products, max(phases["products"])),
            "collectives": profile.collectives,
            "bytes_reduced": profile.bytes_reduced,
        }

    def summary(self, seconds: float) -> dict[str, Any]:
        """The run's totals, for ``result.json``.

        Args:
            seconds: Of training; what is not in steps is data, metrics and checkpoints.
        """
        size = self.coordinator.comm.size
        return {
            "phases": {
                name: {
                    "seconds": round(sum(ranks) / size, 6),
                    "most": round(max(ranks), 6),
                    "slowest_rank": ranks.index(max(ranks)),
                }
                for name, ranks in self._by_rank.items()
            },
            "outside_steps": round(seconds - self._seconds, 6),
            "products_per_second": _rate(self._products, max(self._by_rank["products"])),
            "collectives": self._collectives,
            "bytes_reduced": self._bytes,
        }

    def table(self, seconds: float) -> list[str]:
        """The run's totals as lines of a table; nothing if no step was taken."""
        if not self._steps:
            return []
        found, size = self.summary(seconds), self.coordinator.comm.size
        most = f"{'most, by rank':>19}" if size > 1 else ""
        lines = [f"{'profile':<26}{'seconds':>10}{'a step':>12}{'share':>8}{most}"]
        for name, phase in found["phases"].items():
            if phase["most"]:
                which = f"{phase['most']:.3f} (rank {phase['slowest_rank']})" if size > 1 else ""
                lines.append(self._line(PHASES[name], phase["seconds"], seconds) + f"{which:>19}")
        lines.append(self._line("outside of steps", found["outside_steps"], seconds))
        rate = found["products_per_second"]
        ends = [] if rate is None else [f"{rate:,.0f} products a second of their own time"]
        if size > 1:
            each = _size(self._bytes / self._steps)
            ends.append(f"{self._collectives:,} collectives of {_size(self._bytes)}, {each} a step")
        return [line.rstrip() for line in [*lines, f"  {', '.join(ends)}"] if line.strip()]

    def _line(self, words: str, part: float, whole: float) -> str:
        return f"  {words:<24}{part:>10.3f}{part / self._steps:>12.6f}{part / max(whole, 1e-9):>8.1%}"


def _rate(products: int, seconds: float) -> float | None:
    return round(products / seconds, 3) if products and seconds else None


def _size(number: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f} bytes"
