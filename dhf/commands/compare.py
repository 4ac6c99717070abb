"""python -m dhf compare: runs side by side, as a table of text and as pictures."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dhf.commands.arguments import add_picture_flags, command_parser, require_matplotlib, run_command, writable_folder
from dhf.errors import UsageError

__all__ = ["main"]

_DESCRIPTION = """\
Compare runs: what they solved and how they ended, what it cost each to reach given losses in seconds, steps and gradients, and
the settings in which they differ. With --output, pictures of all of them laid over one another, too.

  python -m dhf compare runs/hf runs/adam
  python -m dhf compare runs/hf runs/adam --losses 20,15,12
  python -m dhf compare runs/hf runs/adam --output pictures --theme both
"""

_EPILOG = """\
By default the losses are the least of each run. Seconds are those in steps: without data, metrics and checkpoints.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, and the paths of the pictures; returns the exit code (0 done, 2 usage)."""
    parser = command_parser("compare", "RUN RUN [RUN ...] [--losses X,Y] [--output FOLDER]", _DESCRIPTION, _EPILOG)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="directory of a run")
    parser.add_argument("--losses", metavar="X,Y", help="losses to be reached")
    parser.add_argument("--output", metavar="FOLDER", help="draw pictures, into this folder")
    add_picture_flags(parser)
    return run_command(parser, argv, _compare)


def _compare(args: Any) -> None:
    from dhf.run.compare import table
    from dhf.run.records import read_runs

    if len(args.runs) < 2:
        raise UsageError("a comparison needs two runs; python -m dhf plot draws a single one")
    levels = None if args.losses is None else _losses(args.losses)
    runs = read_runs(args.runs)
    print(table(runs, levels))
    if args.output is None:
        return
    require_matplotlib()
    from dhf.run.pictures import Pictures

    themes = ["light", "dark"] if args.theme == "both" else [args.theme]
    formats = ["png", "svg"] if args.format == "both" else [args.format]
    pictures = Pictures(writable_folder(Path(args.output)), themes, formats)
    pictures.of_runs(runs)
    for path in pictures.paths:
        print(path)


def _losses(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise UsageError(f"--losses must be numbers such as 20,15, got {text!r}")
    return found


if __name__ == "__main__":
    sys.exit(main())
