"""Phases: the time of a step, divided among what it is spent on; each second is counted once.

    graphs          the gradient, and the graph that products are taken on
    products        this rank's share of curvature products, those of a preconditioner included
    waiting         collectives: waiting for slower ranks, and for the network
    preconditioner  renewing and applying it
    trial           values of the objective at trial points
    dense           forming and factorising the matrix of a direct solver
    vectors         what is left: the vector work of solvers, and dispatch

A phase within another takes the time over. Where nothing is to be measured, entering a phase is one call that does nothing.
Imports no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    import torch

__all__ = ["PHASES", "Phases", "Profile"]

P = ParamSpec("P")
T = TypeVar("T")

PHASES = {
    "graphs": "gradient and its graph",
    "products": "products",
    "waiting": "communication, waiting",
    "preconditioner": "preconditioner",
    "trial": "values at trial points",
    "dense": "matrix of direct",
    "vectors": "vectors",
}

_NOTHING = contextlib.nullcontext()


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
    """Where the time of one step went on one rank.

    Attributes:
        seconds: By phase; they add up to the step's.
        collectives: Sums and gathers of tensors over the ranks.
        bytes_reduced: Of the tensors in them, as this rank gave them; none where there is one rank.
    """

    seconds: Mapping[str, float]
    collectives: int
    bytes_reduced: int


class Phases:
    """A stopwatch with a hand for each phase.

    Args:
        device: Where work is queued: on a GPU it is waited for where phases meet, so that times are those of finished work, and
            nothing overlaps that would have.
        active: Whether anything is measured.
    """

    def __init__(self, device: torch.device | None = None, *, active: bool = True) -> None:
        self.active = active
        self._device = device if device is not None and device.type == "cuda" else None
        self._seconds: dict[str, float] = defaultdict(float)
        self._stack, self._since = ["vectors"], time.perf_counter()
        self._collectives = self._bytes = 0

    def __call__(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Count what runs inside to this phase."""
        return self._inside(name) if self.active else _NOTHING

    def timed(self, name: str, function: Callable[P, T]) -> Callable[P, T]:
        """The function, counted to this phase."""
        if not self.active:
            return function

        @functools.wraps(function)
        def call(*args: P.args, **options: P.kwargs) -> T:
            with self._inside(name):
                return function(*args, **options)

        return call

    def reduced(self, nbytes: int) -> None:
        """Note a collective of so many bytes."""
        self._collectives += 1
        self._bytes += nbytes

    def begin(self) -> None:
        """Set all hands to zero: a step begins."""
        if self.active:
            self._turn()
            self._seconds.clear()
            self._collectives = self._bytes = 0

    def end(self) -> Profile | None:
        """What has been measured since :meth:`begin`, or None."""
        if not self.active:
            return None
        self._turn()
        return Profile({name: self._seconds.get(name, 0.0) for name in PHASES}, self._collectives, self._bytes)

    @contextlib.contextmanager
    def _inside(self, name: str) -> Iterator[None]:
        self._turn()
        self._stack.append(name)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()

    def _turn(self) -> None:
        if self._device is not None:
            import torch

            # the stream that computes alone: what NCCL does on its own is waited for within a collective
            torch.cuda.current_stream(self._device).synchronize()
        now = time.perf_counter()
        self._seconds[self._stack[-1]] += now - self._since
        self._since = now
