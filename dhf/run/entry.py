"""Entry: what every command does around its work: join the ranks, and have one rank say in one line what went wrong.

Imports torch only once there is something to do.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dhf.errors import CommunicationError, UsageError
from dhf.run.config import Config
from dhf.run.outcome import EXIT_DONE, EXIT_RANKS, EXIT_USAGE, SHARED, exit_code, explain, reason_of, speaker
from dhf.run.signals import StopSignals

if TYPE_CHECKING:
    from dhf.comm import Communicator
    from dhf.coordinator import Coordinator

__all__ = ["complain", "on_ranks", "on_ranks_together", "own_rank", "tell_launcher"]

_LEAVING = 60.0  # seconds that the ranks wait for the one that writes


def on_ranks(
    config: Config,
    work: Callable[[Communicator, StopSignals], int],
    *,
    join: Callable[[], Communicator] | None = None,
) -> int:
    """Join the ranks that were started, and do the work as one of them; the exit code.

    Args:
        config: Tells how ranks talk, where they compute, and by which signals they stop.
        work: What to do; it answers for its own failures.
        join: Connects the ranks; as the configuration asks by default.
    """
    from dhf.comm import connect

    # a launcher's death must end its ranks; a shell that started a single process may go
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    with StopSignals(config.stop_signals.split(","), watch_parent=launched) as stop, _plain_warnings():
        try:
            if join is not None:
                comm = join()
            else:
                comm = connect(config.backend, device=config.device, timeout=config.timeout, threads=config.threads)
        except (UsageError, CommunicationError) as error:
            return complain(error, EXIT_USAGE if isinstance(error, UsageError) else EXIT_RANKS)
        try:
            return work(comm, stop)
        except BaseException as error:  # sys.exit() in a user's code, for one: the others do not know
            code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else EXIT_RANKS
            print(f"error: rank {comm.rank} left the run: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            comm.abandon(code or EXIT_RANKS)
            raise
        finally:
            comm.close()


def on_ranks_together(
    config: Config,
    work: Callable[[Coordinator], int],
    *,
    join: Callable[[], Communicator] | None = None,
) -> int:
    """Join the ranks, and do work in which all of them end alike; the exit code. Arguments as :func:`on_ranks`."""

    def together(comm: Communicator, stop: StopSignals) -> int:
        from dhf.coordinator import Coordinator

        coordinator = Coordinator(comm, interrupted=stop)
        return _end_together(comm, stop, lambda: work(coordinator), timeout=config.timeout)

    return on_ranks(config, together, join=join)


def _end_together(comm: Communicator, stop: StopSignals, work: Callable[[], int], *, timeout: float) -> int:
    """What ``work`` returns, on all ranks alike; where it fails, one rank says so, and the code is that of the failure."""
    failure: Exception | None = None
    try:
        code = work()
    except BrokenPipeError as error:
        # who has read the output has seen enough; Python would complain once more when it flushes
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        failure, code = (None, EXIT_DONE) if comm.size == 1 else (error, EXIT_RANKS)
    except Exception as error:
        failure, code = error, exit_code(reason_of(error, at_start=True))
    together = failure is None or comm.size == 1 or isinstance(failure, SHARED)
    # where the others do not notice that this rank leaves, nobody but it can tell
    last_words = not together and not comm.notices and not isinstance(failure, CommunicationError)
    speaks = last_words or comm.rank == speaker(failure)
    if failure is not None:
        explain(failure, speaks=speaks)
    if speaks:
        tell_launcher(code)
    stop.settle(code)
    if together:
        # a rank that leaves first would have the launcher end the others
        with contextlib.suppress(CommunicationError):
            comm.barrier(timeout=min(_LEAVING, timeout))
    else:
        comm.abandon(code, patience=0.0 if speaks else _LEAVING)
    return code


def tell_launcher(code: int) -> None:
    """Write the exit code where a launcher has asked for it: torchrun does not tell its workers' when it was stopped itself."""
    if "DHF_EXIT_CODE_FILE" in os.environ:
        with contextlib.suppress(OSError):
            Path(os.environ["DHF_EXIT_CODE_FILE"]).write_text(str(code))


def complain(error: Exception, code: int) -> int:
    """Say an error that comes before the ranks know one another: once, by rank 0 where a launcher has numbered them."""
    if own_rank() == "0" or isinstance(error, CommunicationError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    return code


def own_rank() -> str:
    """This process's rank by what its launcher says, "0" without one."""
    if "RANK" in os.environ and "MASTER_ADDR" not in os.environ:  # of some other program
        return "0"
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    return next((os.environ[name] for name in names if name in os.environ), "0")


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show warnings as one line each, each once, by the first rank alone."""

    said: set[str] = set()

    def show(message: Warning | str, *_: Any) -> None:
        if own_rank() == "0" and str(message) not in said:
            said.add(str(message))
            print(f"warning: {message}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield
