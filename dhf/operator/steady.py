"""Steady: work that launches the same kernels for every vector, so that a GPU may replay it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from dhf.operator.reduction import Target, Work
from dhf.phases import Phases
from dhf.replay import Replay

__all__ = ["Replays", "Steady"]


@dataclasses.dataclass(frozen=True, slots=True)
class Steady:
    """Work that launches the same kernels for every vector, as long as graphs are kept; a GPU may replay it.

    Attributes:
        launch: The work. What it waits for, it must not wait for on the device.
        prepare: Called on the host with each vector; raises if there is no going on, and says whether the graphs are kept.
        replays: Where what is recorded of it stays from one vector to the next.
        phases: Measures how long it takes, by a replay, too.
    """

    launch: Work
    prepare: Callable[[Tensor], bool]
    replays: Replays
    phases: Phases

    def __call__(self, v: Tensor | None, target: Target) -> None:
        """Once, without a replay."""
        assert v is not None
        with self.phases("products"):
            self.prepare(v)
            self.launch(v, target)

    def start(self, v: Tensor, target: Target, then: Callable[[], None]) -> None:
        """The work, and what always follows it; with a target that is the same each time."""
        replays = self.replays

        def work() -> None:
            self.launch(v if given is None else given, target)
            then()

        with self.phases("products"):
            given = replays.given(v) if self.prepare(v) and replays.wanted else None
            if given is None:
                work()
            else:
                given.copy_(v)
                replays.replay(work)


class Replays:
    """What is recorded of an operator's products, and the vector that is multiplied then."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.forget()

    @property
    def wanted(self) -> bool:
        """Whether products are to be recorded."""
        return self._device.type == "cuda"

    def forget(self) -> None:
        """Free it, since the graphs are to be freed or others."""
        self.replay, self._given = Replay(self._device), torch.empty(0)

    def given(self, like: Tensor) -> Tensor:
        """The vector's memory."""
        if self._given.shape != like.shape:
            self._given = torch.empty_like(like)
        return self._given
