"""Communicator: the protocol by which ranks talk. A new transport writes this, and nothing else knows of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dhf.errors import CommunicationError

__all__ = ["Communicator", "Done", "Pending", "lost"]


class Pending(Protocol):
    """A collective that has been started."""

    def wait(self) -> None:
        """Return once it is done.

        Raises:
            CommunicationError: As the collective itself would have.
        """


class Done:
    """A collective that was over when it was started."""

    def wait(self) -> None:
        """Return at once."""


class Communicator(Protocol):
    """A fixed group of ranks. Every rank calls the same methods in the same order.

    Attributes:
        rank: This rank, 0 to size - 1.
        size: Number of ranks.
        device: Where this rank's tensors live.
        backend: ``"serial"``, ``"gloo"``, ``"nccl"`` or ``"mpi"``.
        collectives: Tensor collectives started so far; object gathers and barriers are not counted.
        attempt: How often the launcher has restarted the ranks.
        notices: Whether ranks notice at once that another has left.
    """

    rank: int
    size: int
    device: torch.device
    backend: str
    collectives: int
    attempt: int
    notices: bool

    def all_reduce(self, buffer: Tensor) -> None:
        """Sum a contiguous float32, float64 or int64 tensor over the ranks, in place.

        Every rank receives the same bits. Shapes and dtypes must agree.

        Raises:
            CommunicationError: If a rank is gone or the timeout has passed; it names the ranks that are missing.
        """

    def start_all_reduce(self, buffer: Tensor) -> Pending:
        """As :meth:`all_reduce`, without waiting; nobody may touch the buffer until :meth:`Pending.wait` has returned."""

    def reduce_scatter(self, buffer: Tensor, out: Tensor) -> None:
        """Sum over the ranks, of which rank r receives the r-th of ``size`` equal pieces.

        Args:
            buffer: Contiguous, shape (size · k,); its content is undefined afterwards.
            out: This rank's piece of the sum, shape (k,).
        """

    def all_gather(self, piece: Tensor, out: Tensor) -> None:
        """Every rank's piece of shape (k,), in rank order, into ``out`` of shape (size · k,); both contiguous."""

    def broadcast(self, buffer: Tensor, source: int = 0) -> None:
        """Overwrite ``buffer`` with that of rank ``source``."""

    def gather_objects(self, value: Any) -> list[Any]:
        """One picklable value per rank, in rank order, on every rank."""

    def barrier(self, timeout: float | None = None) -> None:
        """Wait for every rank, at most ``timeout`` seconds; the error names the ranks that did not come."""

    def remember(self, name: str, value: str) -> str:
        """The value first given under this name by any rank in any attempt of this launch; not a collective."""

    def abandon(self, code: int, patience: float = 0.0) -> None:
        """This rank leaves by itself, with an exit code; where others would wait for it for ever, they are ended as well.

        Args:
            code: The exit code.
            patience: Seconds that another rank has to do the same first.
        """

    def close(self) -> None:
        """Leave the group and free its sockets. Calling it twice does nothing."""


def lost(what: str, cause: str, fate: str, here: Sequence[int], size: int) -> CommunicationError:
    """The error of ranks that have lost others in a collective.

    Args:
        what: The collective.
        cause: What the transport says.
        fate: What has become of the missing.
        here: The ranks that have answered a roll-call.
        size: Number of ranks.
    """
    missing = tuple(r for r in range(size) if r not in here)
    if not missing:
        return CommunicationError(
            f"the ranks lost one another in {what}, though all still run: {cause}; look at the network, and for ranks that "
            "call dhf in different orders",
            (),
            tuple(here),
        )
    names = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {', '.join(map(str, missing))}"
    return CommunicationError(f"{names} missing in {what}: {fate}", missing, tuple(here))
