"""Events: a run's metrics as TensorBoard's event files. Needs the package tensorboard, which is imported when it is asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from dhf.errors import UsageError
from dhf.run.flat import flat

__all__ = ["Events", "require_tensorboard"]


def require_tensorboard() -> None:
    """Raise UsageError unless TensorBoard's writer can be imported."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError("events for TensorBoard need the package tensorboard; pip install 'dhf[tensorboard]'")


class Events:
    """Writes one scalar for each number of a step's metrics, under the metric's name; TensorBoard keeps them as float32.

    Args:
        folder: Of the event files.
        first_step: Steps that were done before; events past it, of a course that was left, are hidden.

    Raises:
        UsageError: If tensorboard is not installed.
    """

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def step(self, row: dict[str, Any]) -> None:
        """One step's metrics, flushed."""
        for name, value in flat(row).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
                self._writer.add_scalar(name.replace(".", "/"), value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
