"""Monitor: what a person sees of a run; a live table on a terminal, plain lines anywhere else.

What is no terminal gets text and newlines alone, whatever the environment asks for: logs are read by other programs, too.
"""

from __future__ import annotations

import math
import os
import sys
from collections import deque
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from dhf.solvers import Iteration

__all__ = ["Monitor"]

_ROWS = 18
_COLUMNS = ("step", "loss", "after", "ratio", "damping", "length", "CG", "ended by", "seconds", "products/s")


class Monitor:
    """Shows steps as they come. Silent on every rank but one.

    Args:
        visible: Whether this rank shows anything.
        title: Stands above the table.
        iterations: Whether each iteration of a solve is shown, too; all lines are then plain.
    """

    def __init__(self, visible: bool, title: str, *, iterations: bool = False) -> None:
        self.visible, self._title, self._iterations = visible, title, iterations
        self._console = Console(highlight=False, emoji=False, force_terminal=_is_terminal())
        self._rows: deque[list[str]] = deque(maxlen=_ROWS)
        self._extra: list[str] = []
        self._live: Live | None = None
        self._lines = 0

    def say(self, text: str) -> None:
        """One line of prose."""
        if not self.visible:
            return
        if self._live is not None:
            self._console.print(text, markup=False, soft_wrap=True)
        else:
            _print(text)

    def start(self) -> None:
        """Open the table."""
        if self.visible and self._console.is_terminal and not self._iterations:
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
        if self._lines % 40 == 0 or self._iterations:
            _print(_plain([*_COLUMNS, *self._extra]))
        self._lines += 1
        _print(_plain(self._rows[-1]))

    def iteration(self, line: Iteration, right_hand_side: float) -> None:
        """One iteration of a solve, and the norm that its residual is relative to."""
        if not self.visible:
            return
        relative = line.residual_norm / right_hand_side if right_hand_side else math.nan
        _print(
            f"  iteration {line.number:>5}  residual {line.residual_norm:<10.4e}  relative {relative:<9.3e}  "
            f"model {line.model:< 12.5e}  curvature {_number(line.curvature, '.4e')}"
        )

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


def _is_terminal() -> bool:
    """Whether lines can be written over; FORCE_COLOR and its like, which CI systems set, make no terminal of a pipe."""
    # Open MPI gives its ranks a terminal of their own, whatever its own output goes to
    return sys.stdout.isatty() and "OMPI_COMM_WORLD_SIZE" not in os.environ and os.environ.get("TERM") != "dumb"


def _print(text: str) -> None:
    """A line at once, and whole; a control character in it, of a file's name say, is told instead of sent."""
    plain = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    sys.stdout.write(plain + "\n")
    sys.stdout.flush()


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
