"""Ranks for tests: forked once per world size, each holding a gloo communicator and waiting for functions to run.

    results = ranks(4, function, key=value)      # function(comm, key=value) on every rank; results in rank order
    outcomes = try_ranks(4, function)            # the same, but what a rank raised stands in its place

A function must live at the top of a module, and what goes in and out must be picklable. Ranks that do not answer
within ``patience`` seconds are killed and the test fails; the next test gets new ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from dhf.comm import TorchDistributed

PATIENCE = 60.0
TIMEOUT = 30.0  # of a collective; below PATIENCE, so that a lost rank is reported by dhf and not by the harness
_fork = multiprocessing.get_context("fork")
_pools: dict[int, Pool] = {}


@dataclasses.dataclass(frozen=True)
class Raised:
    """What a rank raised: the name of its type, its text, and the attribute ``rank`` where it has one."""

    type: str
    text: str
    rank: int | None = None
    trace: str = ""


@dataclasses.dataclass(frozen=True)
class Died:
    """A rank ended without an answer."""

    exit_code: int | None


class Pool:
    """The processes of one world size."""

    def __init__(self, size: int) -> None:
        assert not dist.is_initialized(), "ranks must be forked before this process opens a default group"
        self._folder = tempfile.TemporaryDirectory(prefix="dhf-ranks-")
        pipes = [_fork.Pipe() for _ in range(size)]
        self._connections = [mine for mine, _ in pipes]
        store = os.path.join(self._folder.name, "store")
        self._processes = [_fork.Process(target=_serve, args=(rank, pipes, store), daemon=True) for rank in range(size)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads; torch is held to one
            for process in self._processes:
                process.start()
        for _, theirs in pipes:
            theirs.close()

    def run(self, function: Callable[..., Any], options: dict[str, Any], patience: float) -> list[Any]:
        """What the function returned or raised on every rank, in rank order."""
        work = pickle.dumps((function, options))
        for connection in self._connections:
            with contextlib.suppress(BrokenPipeError):  # a dead rank shows as Died below
                connection.send_bytes(work)
        outcomes: dict[int, Any] = {}
        end = time.monotonic() + patience
        while len(outcomes) < len(self._connections):
            waiting = [c for r, c in enumerate(self._connections) if r not in outcomes]
            ready = multiprocessing.connection.wait(waiting, timeout=max(0.0, end - time.monotonic()))
            if not ready:
                silent = [r for r in range(len(self._connections)) if r not in outcomes]
                self.stop()
                raise AssertionError(f"ranks {silent} gave no answer within {patience:g} s; the others: {outcomes}")
            for connection in ready:
                rank = self._connections.index(connection)
                outcomes[rank] = self._receive(rank)
        return [outcomes[r] for r in range(len(self._connections))]

    def stop(self) -> None:
        """Kill and reap every process."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        self._folder.cleanup()

    def _receive(self, rank: int) -> Any:
        try:
            return pickle.loads(self._connections[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(5)
            return Died(self._processes[rank].exitcode)


def start(sizes: tuple[int, ...] = (1, 2, 3, 4)) -> None:
    """Fork the ranks now, while this process is small and has no threads."""
    for size in sizes:
        _pools[size] = Pool(size)


def stop() -> None:
    """Kill and reap all ranks."""
    while _pools:
        _pools.popitem()[1].stop()


def try_ranks(
    size: int, function: Callable[..., Any], *, fresh: bool = False, patience: float = PATIENCE, **options: Any
) -> list[Any]:
    """``function(comm, **options)`` on every rank: what it returned, or Raised, or Died.

    Args:
        size: How many ranks.
        function: One at the top of a module.
        fresh: Whether to use ranks of its own, for a function that kills one or closes the communicator.
        patience: Seconds after which silent ranks fail the test.
        **options: Passed on.
    """
    pool = Pool(size) if fresh else _pools.pop(size, None) or Pool(size)
    usable = False
    try:
        outcomes = pool.run(function, options, patience)
        failed = [isinstance(o, (Raised, Died)) for o in outcomes]
        # ranks of which only some failed may be out of step
        usable = not fresh and (not any(failed) or all(isinstance(o, Raised) for o in outcomes))
    finally:
        if usable:
            _pools[size] = pool
        else:
            pool.stop()
    return outcomes


def ranks(size: int, function: Callable[..., Any], **options: Any) -> list[Any]:
    """``function(comm, **options)`` on every rank; a rank that raises fails the test. Arguments as :func:`try_ranks`."""
    outcomes = try_ranks(size, function, **options)
    for rank, outcome in enumerate(outcomes):
        if isinstance(outcome, Raised):
            raise AssertionError(f"rank {rank} of {size} raised {outcome.type}: {outcome.text}\n{outcome.trace}")
        assert not isinstance(outcome, Died), f"rank {rank} of {size} died: {outcome}"
    return outcomes


def _serve(rank: int, pipes: list[tuple[Any, Any]], store: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent reaps its ranks
    torch.set_num_threads(1)
    connection, size = pipes[rank][1], len(pipes)
    # a pipe held by other ranks as well would not tell that its own has died
    held = [end for pair in pipes for end in pair] + [c for pool in _pools.values() for c in pool._connections]
    for end in held:
        if end is not connection:
            end.close()
    comm = None
    while True:
        try:
            function, options = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            if comm is None:
                comm = TorchDistributed(
                    torch.device("cpu"),
                    "gloo",
                    store=dist.FileStore(store, size),
                    rank=rank,
                    size=size,
                    timeout=TIMEOUT,
                )
            answer = pickle.dumps(function(comm, **options))
        except Exception as error:
            answer = pickle.dumps(
                Raised(type(error).__name__, str(error), getattr(error, "rank", None), traceback.format_exc())
            )
        connection.send_bytes(answer)
