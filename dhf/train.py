"""python -m dhf.train: read the configuration, join the ranks, and run.

Under torchrun, srun or mpirun every process is a rank; alone, it is one process that does the same.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from dhf.errors import CommunicationError, UsageError
from dhf.run.config import parse
from dhf.run.outcome import EXIT_RANKS, EXIT_USAGE

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one configuration; returns the exit code (0 done, 2 usage, 3 diverged, 4 target not reached, 5 ranks, 75 signal)."""
    try:
        config = parse(argv)
    except UsageError as error:
        return _complain(error, EXIT_USAGE)
    from dhf.comm import connect
    from dhf.run.signals import StopSignals

    # a launcher's death must end its ranks; a shell that started a single process may go
    launched = "TORCHELASTIC_RUN_ID" in os.environ
    with StopSignals(config.stop_signals.split(","), watch_parent=launched) as stop, _plain_warnings():
        try:
            comm = connect(config.backend, device=config.device, timeout=config.timeout, threads=config.threads)
        except (UsageError, CommunicationError) as error:
            return _complain(error, EXIT_USAGE if isinstance(error, UsageError) else EXIT_RANKS)
        from dhf.run.trainer import Trainer

        try:
            return Trainer(config, comm, stop).execute()
        except BaseException as error:  # sys.exit() in a user's code, for one: the others do not know
            code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else EXIT_RANKS
            print(f"error: rank {comm.rank} left the run: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            comm.abandon(code or EXIT_RANKS)
            raise
        finally:
            comm.close()


def _complain(error: Exception, code: int) -> int:
    """Say an error that comes before the ranks know one another: once, by rank 0 where a launcher has numbered them."""
    rank = _own_rank()
    if rank == "0" or isinstance(error, CommunicationError):
        print(f"error: {error}", file=sys.stderr, flush=True)
    return code


def _own_rank() -> str:
    """This process's rank by what its launcher says, "0" without one."""
    if "RANK" in os.environ and "MASTER_ADDR" not in os.environ:  # of some other program
        return "0"
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    return next((os.environ[name] for name in names if name in os.environ), "0")


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show warnings as one line each, by the first rank alone."""

    def show(message: Warning | str, *_: Any) -> None:
        if _own_rank() == "0":
            print(f"warning: {message}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        yield


if __name__ == "__main__":
    sys.exit(main())
