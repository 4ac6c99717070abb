"""Pictures: files of all that can be drawn of runs, for each ground and format asked for."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dhf.errors import UsageError
from dhf.run.plot import draw_overview, draw_profile, draw_residuals
from dhf.run.records import RunRecord
from dhf.run.spectrum import draw_spectrum
from dhf.run.theme import THEMES, Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Pictures"]


class Pictures:
    """Draws into a folder. What is on dark ground has ``-dark`` in its name.

    Args:
        folder: Where files go; it exists.
        themes: ``"light"``, ``"dark"``.
        formats: ``"png"``, ``"svg"``.

    Attributes:
        paths: What has been written.
    """

    def __init__(self, folder: Path, themes: Sequence[str], formats: Sequence[str]) -> None:
        self._folder, self._themes, self._formats = folder, [THEMES[name] for name in themes], formats
        self.paths: list[Path] = []

    def of_runs(self, runs: Sequence[RunRecord], steps: Sequence[int] | None = None) -> None:
        """The overview, the recorded solves (of some steps alone), and the profile where there is one."""
        self._save("run" if len(runs) == 1 else "comparison", lambda theme: draw_overview(runs, theme))
        self._save("residuals", lambda theme: draw_residuals(runs, theme, steps))
        self._save("profile", lambda theme: draw_profile(runs, theme))

    def of_spectrum(self, spectrum: dict[str, Any]) -> None:
        """Eigenvalues and their density."""
        self._save("spectrum", lambda theme: draw_spectrum(spectrum, theme))

    def of_problem(self, run: RunRecord) -> str:
        """What the problem draws of the model in the newest checkpoint; or why there is nothing of it, in a line."""
        from dhf.run.restored import restored_problem

        try:
            problem = restored_problem(run)
            if problem is None or problem.pictures is None:
                return ""
            for theme in self._themes:
                for suffix in self._formats:
                    with tempfile.TemporaryDirectory() as folder, theme.applied(suffix):
                        drawn = problem.pictures(problem.objective.module, Path(folder))
                        for path in sorted(Path(folder).iterdir()) if drawn is None else drawn:
                            self._take(path, theme)
        except Exception as error:  # a user's own code, perhaps
            kind = "" if isinstance(error, UsageError) else f"{type(error).__name__}: "
            return f"no pictures of the problem itself: {kind}{error}"
        return ""

    def _save(self, name: str, draw: Callable[[Theme], Figure | None]) -> None:
        for theme in self._themes:
            with theme.applied():
                figure = draw(theme)
                for suffix in self._formats if figure is not None else ():
                    path = self._folder / f"{_named(name, theme)}.{suffix}"
                    try:
                        figure.savefig(path)  # type: ignore[union-attr]
                    except OSError as error:
                        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from None
                    self.paths.append(path)

    def _take(self, drawn: Path, theme: Theme) -> None:
        path = self._folder / f"{_named(drawn.stem, theme)}{drawn.suffix}"
        if path not in self.paths:
            shutil.move(drawn, path)
            self.paths.append(path)


def _named(name: str, theme: Theme) -> str:
    return name if theme.name == "light" else f"{name}-{theme.name}"
