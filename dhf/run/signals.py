"""StopSignals: SIGTERM, SIGINT and SIGUSR2 ask the run to stop at the next product; a second one ends it at once."""

from __future__ import annotations

import os
import signal
from types import FrameType

__all__ = ["StopSignals"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopSignals:
    """A context manager that remembers a stop signal instead of dying of it."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __call__(self) -> bool:
        """Whether one has come."""
        return self.received is not None

    def __enter__(self) -> StopSignals:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
