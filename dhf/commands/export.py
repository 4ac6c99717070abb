"""python -m dhf export: a run's metrics for other programs, as CSV or as TensorBoard's events."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

from dhf.commands.arguments import command_parser, run_command
from dhf.errors import UsageError

__all__ = ["main"]

_DESCRIPTION = """\
Write the metrics of runs for other programs: one line of CSV per step, or events for TensorBoard.

  python -m dhf export runs/first                        writes runs/first/metrics.csv
  python -m dhf export runs/first --output - | head      to stdout
  python -m dhf export runs/first --solves               writes runs/first/solves.csv: a line per iteration
  python -m dhf export runs/first --to tensorboard       writes runs/first/tensorboard
"""

_EPILOG = """\
Lists have a column for each rank: own_seconds.0, own_seconds.1. What a step does not have, or is not finite, is left empty.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write, and print the paths of what was written; returns the exit code (0 done, 2 usage)."""
    parser = command_parser("export", "RUN [RUN ...] [--to csv|tensorboard]", _DESCRIPTION, _EPILOG)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="directory of a run")
    parser.add_argument(
        "--to", type=Literal["csv", "tensorboard"], metavar="{csv,tensorboard}", default="csv", help="format"
    )
    parser.add_argument("--solves", action="store_true", help="the histories of recorded solves in place of the steps")
    parser.add_argument(
        "--output", metavar="PATH", help="file or folder to write, - for stdout; within the run by default"
    )
    return run_command(parser, argv, _export)


def _export(args: Any) -> None:
    from dhf.run.records import read_run

    if not args.runs:
        raise UsageError("there is nothing to export; give the directory of a run")
    if args.output is not None and len(args.runs) > 1:
        raise UsageError("--output is for one run; leave it out, and each run gets its own")
    if args.to == "tensorboard" and (args.solves or args.output == "-"):
        raise UsageError("--to tensorboard writes a folder of events, one per step; leave out --solves and --output -")
    for path in args.runs:
        run = read_run(path)
        if args.to == "tensorboard":
            target = Path(args.output) if args.output else run.path / "tensorboard"
            _write_events(target, run.rows)
        else:
            from dhf.run.flat import flat

            rows = _iterations(run.solves) if args.solves else [flat(row) for row in run.rows]
            if not rows:
                raise UsageError(f"{path} has recorded no solve; train with --record-solves all")
            if args.output == "-":
                _write_csv(sys.stdout, rows)
                continue
            target = Path(args.output) if args.output else run.path / ("solves.csv" if args.solves else "metrics.csv")
            try:
                with target.open("w", newline="") as file:
                    _write_csv(file, rows)
            except OSError as error:
                raise UsageError(f"{target} cannot be written: {error.strerror or error}") from None
        print(target)


def _write_csv(file: TextIO, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)  # None is written as nothing, numbers so that they read back as they were


def _iterations(solves: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    per_iteration = ("iteration", "residual_norm", "model", "curvature")
    return [
        {"step": solve["step"], **dict(zip(per_iteration, line, strict=True))}
        for solve in solves
        for line in zip(*(solve[name] for name in per_iteration), strict=True)
    ]


def _write_events(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    from dhf.run.events import Events

    if folder.exists() and any(folder.glob("events.out.tfevents.*")):
        raise UsageError(f"{folder} holds events already, and TensorBoard would show both; give another --output")
    try:
        events = Events(folder)
        for row in rows:
            events.step(row)
        events.close()
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror or error}") from None


if __name__ == "__main__":
    sys.exit(main())
