"""torchrun for launch/local.sh: the same arguments, the workers' own exit code, and no traceback of the launcher itself."""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

RANK_FAILURE = 5

if __name__ == "__main__":
    # a worker that fails has said why; the launcher would say at length that it did
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)
    try:
        main(sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            sys.exit(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        print(f"error: rank {rank} was ended by {name} (process {failure.pid}); the others stopped", file=sys.stderr)
        sys.exit(RANK_FAILURE)
    except SignalException as error:
        sys.exit(128 + error.sigval)
