"""python -m dhf.train: read the configuration, join the ranks, and run.

Under torchrun, srun or mpirun every process is a rank; alone, it is one process that does the same.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dhf.errors import UsageError
from dhf.run.config import parse
from dhf.run.entry import complain, on_ranks
from dhf.run.outcome import EXIT_USAGE

if TYPE_CHECKING:
    from dhf.comm import Communicator
    from dhf.run.signals import StopSignals

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one configuration; returns the exit code (0 done, 2 usage, 3 diverged, 4 target not reached, 5 ranks, 75 signal)."""
    try:
        config = parse(argv)
    except UsageError as error:
        return complain(error, EXIT_USAGE)

    def train(comm: Communicator, stop: StopSignals) -> int:
        from dhf.run.trainer import Trainer

        return Trainer(config, comm, stop).execute()

    return on_ranks(config, train)


if __name__ == "__main__":
    sys.exit(main())
