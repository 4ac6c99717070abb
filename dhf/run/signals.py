"""StopSignals: a stop signal asks the run to end at the next product; a second one ends the process at once.

A thread of its own reads the signals, since Python's handlers run only when the main thread is back from a product or
a collective, which may be waiting for a rank that never comes. The thread also notices when the launcher has died, which is
taken as a stop signal: the ranks of a run without a launcher must not go on as orphans.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Sequence
from types import FrameType

__all__ = ["StopSignals", "signal_number"]

_SAME_REQUEST = 1.0  # seconds: a launcher and a scheduler may each pass on one and the same request
_ORPHAN_GRACE = 20.0  # seconds for the ranks to save, once their launcher is gone
_LOOK = 1.0  # seconds between looks for the launcher


class StopSignals:
    """A context manager that remembers a stop signal instead of dying of it. Enter it on the main thread.

    Args:
        names: The signals, such as ``"SIGTERM"``.
        watch_parent: Whether the death of the parent process counts as a stop signal.

    Attributes:
        received: The number of the first signal, or None.
        orphaned: Whether the parent process has died.
    """

    def __init__(self, names: Sequence[str] = ("SIGTERM", "SIGINT", "SIGUSR2"), *, watch_parent: bool = False) -> None:
        self.received: int | None = None
        self.orphaned = False
        self._numbers = [signal_number(name) for name in names]
        self._parent = os.getppid() if watch_parent else None
        self._since = 0.0
        self._code: int | None = None
        self._before: dict[int, object] = {}

    def __call__(self) -> bool:
        """Whether one has come."""
        return self.received is not None

    def settle(self, code: int) -> None:
        """The run is over and written: from now on a second signal ends the process with this exit code."""
        self._code = code

    def __enter__(self) -> StopSignals:
        global _active
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._old_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in self._numbers:
            self._before[number] = signal.signal(number, _left_to_the_thread)
        _active = self
        self._over = False
        self._thread = threading.Thread(target=self._watch, name="dhf-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        global _active
        _active = None
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._old_wakeup)
        self._over = True
        os.write(self._write_end, b"\0")
        self._thread.join()
        os.close(self._read_end)
        os.close(self._write_end)

    def _watch(self) -> None:
        while not self._over:
            ready, _, _ = select.select([self._read_end], [], [], _LOOK)
            if ready:
                for number in os.read(self._read_end, 64):
                    if number in self._numbers:
                        self._note(number)
            if self._parent is not None and os.getppid() != self._parent:
                self._note_orphaned()

    def _note(self, number: int) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
        elif time.monotonic() - self._since >= _SAME_REQUEST:
            os._exit(128 + number if self._code is None else self._code)

    def _note_orphaned(self) -> None:
        if not self.orphaned:
            self.orphaned, self._orphaned_since = True, time.monotonic()
            self.received = self.received or signal.SIGHUP
        elif time.monotonic() - self._orphaned_since >= _ORPHAN_GRACE:
            os._exit(128 + signal.SIGHUP)


def signal_number(name: str) -> int:
    """The number of a signal by its name, with or without ``SIG``.

    Raises:
        ValueError: If there is no such signal, or it cannot be caught.
    """
    full = name if name.startswith("SIG") else f"SIG{name}"
    number = getattr(signal, full, None)
    if not isinstance(number, signal.Signals) or number in (signal.SIGKILL, signal.SIGSTOP):
        raise ValueError(f"there is no signal {name!r} that can be caught")
    return int(number)


def _left_to_the_thread(number: int, frame: FrameType | None) -> None:
    """The thread has been told through the wakeup pipe."""


_active: StopSignals | None = None


def _forget_in_child() -> None:
    # a forked helper (a data loader's worker) must die of its signals, and not tell this process of them
    if _active is not None:
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
            for number in _active._numbers:
                signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_child)
