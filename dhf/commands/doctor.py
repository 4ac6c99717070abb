"""python -m dhf doctor: look at this machine, the ranks and a problem, and say what to change."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dhf.commands.parsing import Asked, read
from dhf.errors import RanksDifferError, UsageError
from dhf.run.config import Config
from dhf.run.entry import complain, on_ranks_together, own_rank
from dhf.run.flags import Group
from dhf.run.outcome import EXIT_DONE, EXIT_USAGE, exit_code

if TYPE_CHECKING:
    from dhf.comm import Communicator
    from dhf.coordinator import Coordinator

__all__ = ["EXIT_CHANGE", "Doctor", "main"]

EXIT_CHANGE = 6

_DESCRIPTION = """\
Look at this machine and its launcher, and try the collectives on the ranks that are there. With --problem, look at the problem as
a run with the same flags or configuration file would begin it: every module's derivatives, determinism, the loss, numbers
against finite differences, a trial solve, memory and time. Ends with what to change, or with the one word "ready".

  python -m dhf doctor
  python -m dhf doctor --problem my_problem.py:build --options.width 128
  python -m dhf doctor --config runs/first/config.yaml --cg-rtol 1e-9 --json
  torchrun --nproc_per_node=4 -m dhf doctor --problem my_problem.py:build --dtype float64
"""

_EPILOG = """\
An error is what dhf refuses, or what would make its numbers wrong; a warning works, and should be changed all the same; a note is
good to know. Finite differences are taken in float64, on eight samples; costs are measured on one micro-batch of each rank.

Flags that begin, end or write a run are taken and change nothing here.

exit codes: 0 ready, 6 something must be changed, 2 usage, 5 communication or rank failure, 75 stopped by a signal. torchrun turns
all but 0 into 1.
"""

_report = Group("report")


@dataclasses.dataclass(frozen=True)
class Doctor:
    """The flags of doctor alone."""

    problem: str | None = _report(
        None, "a built-in problem, or FILE.py:FUNCTION; without it, the machine and ranks alone"
    )
    json: bool = _report(False, "print JSON in place of the report")


def main(argv: Sequence[str] | None = None) -> int:
    """Look as the flags say; the exit code."""
    try:
        asked = read(
            argv,
            "doctor",
            Doctor,
            [field.name for field in dataclasses.fields(Config)],
            passed=("problem",),
            description=_DESCRIPTION,
            epilog=_EPILOG,
        )
    except UsageError as error:
        return complain(error, EXIT_USAGE)
    refusals: list[UsageError] = []

    return on_ranks_together(
        asked.config, lambda coordinator: _look(asked, refusals, coordinator), join=lambda: _join(asked, refusals)
    )


def _join(asked: Asked[Doctor], refusals: list[UsageError]) -> Communicator:
    """The ranks as the flags ask for them, or as they can meet; alone where they cannot."""
    from dhf.comm import Serial, connect

    config = asked.config
    for backend, device in ((config.backend, config.device), ("auto", "auto")):
        try:
            return connect(backend, device=device, timeout=config.timeout, threads=config.threads)
        except RanksDifferError:
            raise
        except UsageError as error:
            if str(error) not in map(str, refusals):
                refusals.append(error)
    return Serial()


def _look(asked: Asked[Doctor], refusals: Sequence[UsageError], coordinator: Coordinator) -> int:
    from dhf.doctor.examine import examine
    from dhf.doctor.report import as_dict, in_lines
    from dhf.run.monitor import Monitor
    from dhf.run.preflight import require_same_settings

    own, comm = asked.own, coordinator.comm
    require_same_settings(coordinator, asked.config, own)
    # ranks that could not meet are each the first of one
    leads = comm.rank == 0 and (comm.size > 1 or own_rank() == "0")
    examination = examine(asked.config, refusals, coordinator, problem=own.problem is not None)
    code = EXIT_DONE if examination.ready else EXIT_CHANGE
    if leads and own.json:
        print(json.dumps(as_dict(examination, code), indent=2), flush=True)
    elif leads:
        monitor = Monitor(True, "")
        for line in in_lines(examination):
            monitor.say(line)
    return code if coordinator.stopping is None else exit_code(coordinator.stopping)
