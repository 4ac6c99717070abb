"""Pictures of a spectrum: the density of eigenvalues, and the largest of them by rank.

A spectrum is a JSON file with one of these or both, and whatever else:

    {"eigenvalues": [...], "density": {"grid": [...], "values": [...]}}
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dhf.errors import UsageError
from dhf.run.theme import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_spectrum", "read_spectrum"]

_DECADES = 8  # of a density below its maximum that are shown


def read_spectrum(path: Path | str) -> dict[str, Any]:
    """The file's ``eigenvalues`` and ``density``, as far as it has them.

    Raises:
        UsageError: If it cannot be read, or holds neither.
    """
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise UsageError(f"{path} is no JSON; give the file that dhf spectrum has written") from None
    if not isinstance(found, dict) or not (found.get("eigenvalues") or found.get("density")):
        raise UsageError(f"{path} holds no spectrum: it needs eigenvalues, or a density with grid and values")
    density = found.get("density")
    if density and not (
        isinstance(density, dict) and _numbers(density.get("grid")) and _numbers(density.get("values"))
    ):
        raise UsageError(f"{path}: density must have grid and values, two lists of numbers")
    if density and len(density["grid"]) != len(density["values"]):
        raise UsageError(f"{path}: density has {len(density['grid'])} grid points and {len(density['values'])} values")
    if not _numbers(found.get("eigenvalues") or []):
        raise UsageError(f"{path}: eigenvalues must be a list of numbers")
    return found


def draw_spectrum(spectrum: dict[str, Any], theme: Theme) -> Figure:
    """The density on a logarithmic axis with the eigenvalues below it, and beside it the eigenvalues by rank."""
    from matplotlib.figure import Figure

    eigenvalues, density = spectrum.get("eigenvalues") or [], spectrum.get("density")
    panels = [panel for panel, there in ((_draw_density, density), (_draw_by_rank, eigenvalues)) if there]
    figure = Figure(figsize=(5.6 * len(panels), 4.0), layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axis, eigenvalues, density, theme)
        axis.grid(True)
    return figure


def _draw_density(axis: Axes, eigenvalues: list[float], density: Any, theme: Theme) -> None:
    values = [v if v > 0 else math.nan for v in density["values"]]
    axis.plot(density["grid"], values, color=theme.colour(0), gid="density")
    largest = max((v for v in values if not math.isnan(v)), default=1.0)
    axis.set_yscale("log")
    axis.set_ylim(largest * 10.0**-_DECADES, largest * 3)
    if eigenvalues:
        rug = axis.get_xaxis_transform()
        at = [0.02] * len(eigenvalues)
        axis.plot(
            eigenvalues, at, "|", transform=rug, color=theme.colour(1), markersize=9, gid="rug", label="eigenvalues"
        )
        axis.legend(loc="upper right")
    axis.axvline(0.0, color=theme.quiet, linewidth=0.8)
    axis.set_xlabel("eigenvalue")
    axis.set_ylabel("density")


def _draw_by_rank(axis: Axes, eigenvalues: list[float], density: Any, theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator

    ordered = sorted(eigenvalues, key=abs, reverse=True)
    signs = (("positive", "o", "full", 0, lambda v: v > 0), ("negative", "s", "none", 1, lambda v: v < 0))
    for name, marker, fill, colour, belongs in signs:
        at = [(rank, abs(v)) for rank, v in enumerate(ordered, 1) if belongs(v)]
        if at:
            x, y = zip(*at, strict=True)
            axis.plot(x, y, marker, fillstyle=fill, color=theme.colour(colour), markersize=5, label=name, gid=name)
    axis.set_yscale("log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("rank by size")
    axis.set_ylabel("size of the eigenvalue")
    axis.legend(loc="best")


def _numbers(values: Any) -> bool:
    numbers = isinstance(values, list) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    return numbers and all(map(math.isfinite, values))
