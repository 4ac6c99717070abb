"""Theme: the colours and strokes of pictures, on light ground and on dark. Imports matplotlib only when it is asked to draw.

Colours are those of Okabe and Ito (2008), which people with any colour vision tell apart, darker on light ground and lighter on
dark, so that each has a contrast of at least 3 to 1 against it (WCAG 2.1, for graphics); lines differ in their dashes as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

__all__ = ["DARK", "LIGHT", "THEMES", "Theme"]

Dash = tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Theme:
    """One ground.

    Attributes:
        name: ``"light"`` or ``"dark"``.
        ground: Behind everything.
        text: Letters, and marks that belong to no run.
        quiet: Axes and ticks.
        grid: Lines behind the data.
        colours: Of runs, in this order.
        sequence: A colour map whose whole range shows on this ground.
        sequence_from, sequence_to: The part of it that is used.
    """

    name: str
    ground: str
    text: str
    quiet: str
    grid: str
    colours: tuple[str, ...]
    sequence: str
    sequence_from: float
    sequence_to: float

    def colour(self, i: int) -> str:
        """Of the i-th run."""
        return self.colours[i % len(self.colours)]

    def dash(self, i: int) -> Dash:
        """Of the i-th run's line: on and off in points; empty for a whole line."""
        dashes: tuple[Dash, ...] = ((), (5, 1.6), (1.4, 1.4), (6, 1.6, 1.4, 1.6))
        return dashes[i % len(dashes)]

    @contextlib.contextmanager
    def applied(self, suffix: str = "png") -> Iterator[None]:
        """Figures that are made inside are drawn on this ground, and saved in this format where their name has none."""
        import matplotlib

        settings: dict[Any, Any] = {
            "figure.facecolor": self.ground,
            "savefig.facecolor": self.ground,
            "axes.facecolor": self.ground,
            "axes.edgecolor": self.quiet,
            "axes.labelcolor": self.text,
            "axes.titlecolor": self.text,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "axes.titlesize": 10,
            "axes.labelsize": 9.5,
            "xtick.color": self.quiet,
            "ytick.color": self.quiet,
            "xtick.labelcolor": self.text,
            "ytick.labelcolor": self.text,
            "xtick.labelsize": 8.5,
            "ytick.labelsize": 8.5,
            "grid.color": self.grid,
            "grid.linewidth": 0.6,
            "text.color": self.text,
            "legend.frameon": False,
            "legend.fontsize": 8.5,
            "lines.linewidth": 1.4,
            "savefig.format": suffix,
            "savefig.dpi": 150,
            "svg.fonttype": "none",
            "svg.hashsalt": "dhf",
        }
        with matplotlib.rc_context(settings):
            yield


LIGHT = Theme(
    "light",
    ground="#ffffff",
    text="#1f2328",
    quiet="#6e7781",
    grid="#e4e7eb",
    colours=("#0072b2", "#c44e00", "#007a58", "#a8497f", "#8a6d00", "#3d7fa6", "#1f2328"),
    sequence="viridis_r",
    sequence_from=0.25,
    sequence_to=1.0,
)
DARK = Theme(
    "dark",
    ground="#0d1117",
    text="#e6edf3",
    quiet="#8b949e",
    grid="#262c36",
    colours=("#56b4e9", "#f0883e", "#2fc49a", "#e09bc4", "#f0e442", "#8fb8ff", "#e6edf3"),
    sequence="viridis",
    sequence_from=0.3,
    sequence_to=1.0,
)
THEMES = {theme.name: theme for theme in (LIGHT, DARK)}
