"""Replay: work that a GPU has been shown once and does again at one word from the host.

A small network's product is a few hundred kernels of a few microseconds each, and a host takes longer to launch them than a GPU
to run them. CUDA can record a sequence of launches and repeat it; the same kernels run on the same memory, so the numbers are
the same. What differs from one call to the next must be in tensors that stay where they are.

Recording needs a stream of its own, and a backward pass runs on the stream of its forward pass; so graphs that are to be recorded
are built ``aside``, too.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["Replay", "SteadyMap", "aside"]

_streams: dict[int | None, torch.cuda.Stream] = {}


@contextlib.contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """On a GPU, work inside on a stream of dhf's own, in order with what comes before and after; elsewhere as it is.

    Both streams wait for one another at the borders, so that memory which is freed on one may be taken by the other.
    """
    if device.type != "cuda":
        yield
        return
    own, current = _stream(device), torch.cuda.current_stream(device)
    if own == current:
        yield
        return
    own.wait_stream(current)
    try:
        with torch.cuda.stream(own), _other_graphs_may_be_elsewhere():
            yield
    finally:
        current.wait_stream(own)


@contextlib.contextmanager
def _other_graphs_may_be_elsewhere() -> Iterator[None]:
    """Have torch not warn of parameters that stand in a graph of another stream, too: no gradient is accumulated here."""
    warn = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)  # since torch 2.10
    if warn is None:
        yield
        return
    before: bool = getattr(torch._C, "_warn_on_accumulate_grad_stream_mismatch", lambda: True)()
    warn(False)
    try:
        yield
    finally:
        warn(before)


class SteadyMap:
    """A function of one tensor that launches the same kernels for each, so that a replay may take its place.

    Args:
        launch: The function.
        note: Called on the host whenever it is applied, by a replay, too.
    """

    def __init__(self, launch: Callable[[Tensor], Tensor], note: Callable[[], None] = lambda: None) -> None:
        self.launch, self.note = launch, note

    def __call__(self, x: Tensor) -> Tensor:
        """The function's value."""
        self.note()
        return self.launch(x)


class Replay:
    """Work that launches the same kernels on the same memory each time it is done.

    On a GPU it is recorded when it is done for the second time and replayed from then on, unless it cannot be (it waits for the
    device, say) or the memory that it needs meanwhile, which a recording keeps, is more than the device has left.

    Args:
        device: Where it is done.
        warm: Whether its kernels have been launched before, so that it may be recorded at once.

    Attributes:
        refused: Why it is not replayed, or None.
    """

    def __init__(self, device: torch.device, *, warm: bool = False) -> None:
        self._device, self._done = device, warm
        self._recording: torch.cuda.CUDAGraph | None = None
        self.refused: str | None = None if device.type == "cuda" else "it is not on a GPU"

    def __call__(self, work: Callable[[], object]) -> None:
        """Do it, by this function or by what has been recorded of it."""
        if self._recording is None and self._done and self.refused is None:
            self._record(work)
        self._done = True
        if self._recording is not None:
            self._recording.replay()
        else:
            work()

    def _record(self, work: Callable[[], object]) -> None:
        device = self._device
        if torch.cuda.is_current_stream_capturing():
            return
        recording, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        reserved = torch.cuda.memory_reserved(device)
        collecting = gc.isenabled()
        gc.disable()  # it may free another recording meanwhile, which CUDA does not allow
        try:
            with aside(device):
                # other threads, those that watch over collectives for one, may go on with what a recording forbids
                recording.capture_begin(pool, capture_error_mode="thread_local")
                try:
                    work()
                finally:
                    recording.capture_end()
        except Exception as error:
            self.refused = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            _give_up(recording, pool, device)
            return
        finally:
            if collecting:
                gc.enable()
        kept = torch.cuda.memory_reserved(device) - reserved
        if kept > torch.cuda.mem_get_info(device)[0]:
            self.refused = f"a recording would keep {kept / 1e6:.0f} MB"
            return
        self._recording = recording


def _give_up(recording: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    """Take back what a recording that failed has left behind in torch, which takes it to be going on still.

    Its memory would be kept, cached memory would not be freed any more where it is wanting, and in earlier releases neither
    random numbers could be drawn nor other recordings replayed.
    """
    with contextlib.suppress(RuntimeError):
        recording.reset()
    with contextlib.suppress(RuntimeError, AttributeError):  # where the end of the recording has come as far itself
        torch._C._cuda_endAllocateToPool(_index(device), pool)
        torch._C._cuda_releasePool(_index(device), pool)
    with contextlib.suppress(RuntimeError), aside(device):
        empty = torch.cuda.CUDAGraph()  # one that succeeds sets the generator right
        empty.capture_begin(capture_error_mode="thread_local")
        try:
            torch.zeros(1, device=device)
        finally:
            empty.capture_end()


def _index(device: torch.device) -> int:
    return device.index if device.index is not None else torch.cuda.current_device()


def _stream(device: torch.device) -> torch.cuda.Stream:
    index = _index(device)
    if index not in _streams:
        _streams[index] = torch.cuda.Stream(index)
    return _streams[index]
