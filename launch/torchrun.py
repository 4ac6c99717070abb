"""torchrun for launch/local.sh: the same arguments, the workers' own exit code, and no traceback of the launcher itself.

SIGUSR2, which schedulers send before a time limit, is passed on to the workers like SIGTERM; torchrun alone would die of it.
"""

import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.run import main

RANK_FAILURE = 5


def pass_on(number: int, _: object) -> None:
    """What torchrun itself does on SIGTERM: it ends its workers with this signal, and waits for them."""
    raise SignalException(f"the launcher got {signal.Signals(number).name}", signal.Signals(number))


def apart(arguments: list[str]) -> list[str]:
    """With ``--`` ahead of the module, lest torchrun take its --monitor for a short form of --monitor-interval."""
    at = arguments.index("-m") + 1 if "-m" in arguments else len(arguments)
    return [*arguments[:at], "--", *arguments[at:]] if arguments[at : at + 1] not in ([], ["--"]) else arguments


def launch(arguments: list[str]) -> int:
    """Run torchrun; the exit code."""
    signal.signal(signal.SIGUSR2, pass_on)
    with tempfile.TemporaryDirectory(prefix="dhf-launch-") as folder:
        told = Path(folder, "exit-code")
        os.environ["DHF_EXIT_CODE_FILE"] = str(told)
        try:
            main(apart(arguments))
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode >= 0:
                return failure.exitcode
            name = signal.Signals(-failure.exitcode).name
            print(f"error: rank {rank} was ended by {name} (process {failure.pid})", file=sys.stderr)
            return RANK_FAILURE
        except RendezvousError as error:
            cause = str(error).partition(". See ")[0]
            print(f"error: this launcher lost the host where the launchers meet: {cause}", file=sys.stderr)
            return RANK_FAILURE
        except SignalException as error:
            return int(told.read_text()) if told.exists() else 128 + error.sigval
    return 0


if __name__ == "__main__":
    # a worker that fails has said why; the launcher would say at length that it did
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
    sys.exit(launch(sys.argv[1:]))
