"""Monitor: what a person sees of a run; a live table on a terminal, plain lines in a log file."""

from __future__ import annotations

import math
import os
import sys
from collections import deque
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

__all__ = ["Monitor"]

_ROWS = 18
_COLUMNS = ("step", "loss", "after", "ratio", "damping", "length", "CG", "ended by", "seconds", "products/s")


class Monitor:
    """Shows steps as they come. Silent on every rank but one.

    Args:
        visible: Whether this rank shows anything.
        title: Stands above the table.
    """

    def __init__(self, visible: bool, title: str) -> None:
        self.visible, self._title = visible, title
        # Open MPI gives its ranks a terminal of their own, whatever its own output goes to
        self._console = Console(highlight=False, force_terminal=False if "OMPI_COMM_WORLD_SIZE" in os.environ else None)
        self._rows: deque[list[str]] = deque(maxlen=_ROWS)
        self._extra: list[str] = []
        self._live: Live | None = None
        self._lines = 0

    def say(self, text: str) -> None:
        """One line of prose."""
        if self.visible:
            self._console.print(text, markup=False, soft_wrap=True)

    def start(self) -> None:
        """Open the table."""
        if self.visible and self._console.is_terminal:
            self._live = Live(self._table(), console=self._console, refresh_per_second=8)
            self._live.start()

    def step(self, row: dict[str, Any], extra: dict[str, float]) -> None:
        """One step: its metrics, and the problem's own numbers."""
        if not self.visible:
            return
        cells = _cells(row)
        self._rows.append([*cells, *(f"{value:.5g}" for value in extra.values())])
        self._extra = list(extra)
        if self._live is not None:
            self._live.update(self._table())
            return
        if self._lines % 40 == 0:
            print(_plain([*_COLUMNS, *self._extra]))
        self._lines += 1
        print(_plain(self._rows[-1]))
        sys.stdout.flush()

    def stop(self) -> None:
        """Close the table; what it shows stays on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _table(self) -> Table:
        table = Table(title=self._title, title_justify="left", header_style="bold", pad_edge=False, box=None)
        for name in [*_COLUMNS, *self._extra]:
            table.add_column(name, justify="left" if name == "ended by" else "right", no_wrap=True)
        for row in self._rows:
            table.add_row(*row)
        return table


def _cells(row: dict[str, Any]) -> list[str]:
    per_second = row["products"] / row["seconds"] if row["seconds"] > 0 else math.nan
    return [
        str(row["step"]),
        f"{row['loss']:.6g}",
        f"{row['loss_after']:.6g}",
        _number(row["reduction_ratio"], ".2f"),
        f"{row['damping']:.2e}" if row["damping"] else "-",
        _number(row["step_length"], ".3g"),
        str(row["cg_iterations"]) if row["cg_reason"] else "-",
        (row["cg_reason"] or "").lower().replace("_", " "),
        f"{row['seconds']:.2f}",
        _number(per_second, ".0f") if row["products"] else "-",
    ]


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)


def _plain(cells: list[str]) -> str:
    widths = (5, 11, 11, 6, 9, 7, 4, 20, 8, 10)
    shown = [
        f"{cell:<20}" if i == 7 else f"{cell:>{widths[i] if i < len(widths) else 14}}" for i, cell in enumerate(cells)
    ]
    return " ".join(shown)
