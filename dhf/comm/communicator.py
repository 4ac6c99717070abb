"""Communicator: the protocol by which ranks talk. A new transport writes this, and nothing else knows of it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Communicator"]


class Communicator(Protocol):
    """A fixed group of ranks. Every rank calls the same methods in the same order.

    Attributes:
        rank: This rank, 0 to size - 1.
        size: Number of ranks.
        device: Where this rank's tensors live.
        backend: ``"serial"``, ``"gloo"`` or ``"nccl"``.
        collectives: Tensor collectives started so far; object gathers and barriers are not counted.
        attempt: How often the launcher has restarted the ranks.
    """

    rank: int
    size: int
    device: torch.device
    backend: str
    collectives: int
    attempt: int

    def all_reduce(self, buffer: Tensor) -> None:
        """Sum a contiguous float32, float64 or int64 tensor over the ranks, in place.

        Every rank receives the same bits. Shapes and dtypes must agree.

        Raises:
            CommunicationError: If a rank is gone or the timeout has passed; it names the ranks that are missing.
        """

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """Overwrite ``buffer`` with that of rank ``source``."""

    def gather_objects(self, value: Any) -> list[Any]:
        """One picklable value per rank, in rank order, on every rank."""

    def barrier(self, timeout: float | None = None) -> None:
        """Wait for every rank, at most ``timeout`` seconds; the error names the ranks that did not come."""

    def remember(self, name: str, value: str) -> str:
        """The value first given under this name by any rank in any attempt of this launch; not a collective."""

    def close(self) -> None:
        """Leave the group and free its sockets. Calling it twice does nothing."""
