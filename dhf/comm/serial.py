"""Serial: one rank that talks to nobody; the same program in one process, for debugging."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dhf.comm.communicator import Done, Pending

__all__ = ["Serial"]


class Serial:
    """The Communicator of a single process.

    Args:
        device: Where tensors live; CPU by default.
    """

    notices = True

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.rank, self.size, self.backend = 0, 1, "serial"
        self.device = torch.device(device)
        self.collectives = self.attempt = 0

    def all_reduce(self, buffer: Tensor) -> None:
        """The sum over one rank is the buffer itself."""
        self.collectives += 1

    def start_all_reduce(self, buffer: Tensor) -> Pending:
        """The sum is there already."""
        self.collectives += 1
        return Done()

    def reduce_scatter(self, buffer: Tensor, out: Tensor) -> None:
        """The one piece is the whole."""
        self.collectives += 1
        out.copy_(buffer)

    def all_gather(self, piece: Tensor, out: Tensor) -> None:
        """The whole is the one piece."""
        self.collectives += 1
        out.copy_(piece)

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """The buffer is already everywhere."""
        self.collectives += 1

    def gather_objects(self, value: Any) -> list[Any]:
        """The one value."""
        return [value]

    def barrier(self, timeout: float | None = None) -> None:
        """There is nobody to wait for."""

    def remember(self, name: str, value: str) -> str:
        """There was no attempt before."""
        return value

    def abandon(self, code: int, patience: float = 0.0) -> None:
        """Nobody waits."""

    def close(self) -> None:
        """There is nothing to free."""
