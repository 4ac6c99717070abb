"""Recordings without a GPU: what CUDA would keep of some work, kept on the CPU, with the same ways to go wrong.

A recording knows addresses alone. So tensors that the work has not made itself are held weakly here: one that is freed between
two replays fails the test, where a GPU would read whatever stands there by then. What would have the device wait for the host
fails as well, where a GPU would refuse to record.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dhf.coordinator import Coordinator
from dhf.operator import steady
from dhf.solvers import queued

_WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.lift_fresh.default,
    torch.ops.aten.nonzero.default,
}


class RecordedOnCpu:
    """Stands in for :class:`dhf.replay.Replay`.

    Attributes:
        replayed: How often any recording has been replayed.
    """

    replayed = 0

    def __init__(self, device: torch.device, *, warm: bool = False) -> None:
        self._done, self._recorder = warm, _Recorder()
        self.refused: str | None = None

    def __call__(self, work: Callable[[], object]) -> None:
        """Do it, or replay it."""
        if self._recorder.calls:
            self._recorder.replay()
            RecordedOnCpu.replayed += 1
        elif self._done:
            with self._recorder:
                work()
        else:
            work()
        self._done = True


class _Outside:
    """Where a tensor stands that the work has not made."""

    def __init__(self, t: Tensor) -> None:
        self._storage = StorageWeakRef(t.untyped_storage())
        self._dtype, self._place = t.dtype, (t.storage_offset(), t.shape, t.stride())

    def tensor(self) -> Tensor:
        """What stands there now."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        assert storage is not None, f"a recording reads memory that has been freed: {self._dtype}, {self._place}"
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._place)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self._made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in _WAITING, f"{func} has the device wait for the host"
        kept = tree_map_only(Tensor, self._held, (args, kwargs or {}))
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs or {}))}
        found = func(*args, **(kwargs or {}))
        self._made |= {t.untyped_storage()._cdata for t in _tensors(found)} - given
        self.calls.append((func, *kept, tree_map_only(Tensor, self._held, found)))
        return found

    def _held(self, t: Tensor) -> Any:
        return t.detach() if t.untyped_storage()._cdata in self._made else _Outside(t)

    @torch.no_grad()
    def replay(self) -> None:
        """The same operations, on the same memory."""
        for func, args, kwargs, found in self.calls:
            args, kwargs, before = tree_map_only(_Outside, _Outside.tensor, (args, kwargs, found))
            for now, then in zip(_tensors(func(*args, **kwargs)), _tensors(before), strict=True):
                if now.data_ptr() != then.data_ptr():
                    then.copy_(now)


class _OnDevice:
    """A status word that says that it is on a device."""

    device = torch.device("cuda")

    def __init__(self, word: Tensor) -> None:
        self._word, self.dtype, self.zero_ = word, word.dtype, word.zero_

    def __setitem__(self, place: int, value: Tensor) -> None:
        self._word[place] = value


def record_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have products and iterations recorded, on a CPU."""
    see: Any = Coordinator.see
    monkeypatch.setattr(RecordedOnCpu, "replayed", 0)
    monkeypatch.setattr(Coordinator, "see", lambda self, word, *seen: see(self, _OnDevice(word), *seen))
    monkeypatch.setattr(steady, "Replay", RecordedOnCpu)
    monkeypatch.setattr(queued, "Replay", RecordedOnCpu)
    monkeypatch.setattr(steady.Replays, "wanted", property(lambda self: True))


def _tensors(part: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(part) if isinstance(t, Tensor)]
