"""python -m dhf plot: pictures of runs, of one or of several laid over one another."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dhf.commands.arguments import (
    add_picture_flags,
    command_parser,
    positive_whole_numbers,
    require_matplotlib,
    run_command,
    writable_folder,
)
from dhf.errors import UsageError

__all__ = ["main"]

_DESCRIPTION = """\
Draw runs: loss against time, steps and cost; CG iterations and what ended them; damping and reduction ratio; residuals of
recorded solves; where the time went, if that was measured; and what the problem itself draws (reconstructions, the solution
of a PDE and its error). Several runs are laid over one another. A run that goes on, or was killed, is drawn as far as it went.

  python -m dhf plot runs/first
  python -m dhf plot runs/first --theme both --format svg
  python -m dhf plot runs/hf runs/adam runs/lbfgs --output pictures
  python -m dhf plot runs/first --solves 1,10,50
  python -m dhf plot --spectrum spectrum.json
"""

_EPILOG = """\
The cost is counted in gradients: a gradient is 1, a value of the objective 1/3, a Gauss-Newton product 4/3, a Hessian product 2.
The problem's own pictures are drawn from the newest checkpoint; a problem file is Python code, and is run.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, and print the paths of the pictures; returns the exit code (0 done, 2 usage)."""
    parser = command_parser("plot", "RUN [RUN ...] [--output FOLDER] [...]", _DESCRIPTION, _EPILOG)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="directory of a run")
    parser.add_argument(
        "--output", metavar="FOLDER", help="where pictures go; plots in the run, or in this folder for several runs"
    )
    add_picture_flags(parser)
    parser.add_argument(
        "--solves", metavar="STEPS", help="steps whose solves are drawn, 1,5,10 say; all that are recorded"
    )
    parser.add_argument("--spectrum", metavar="FILE", help="JSON of eigenvalues or their density, to be drawn, too")
    parser.add_argument("--no-problem", action="store_true", help="leave out the problem's own pictures")
    return run_command(parser, argv, _draw)


def _draw(args: Any) -> None:
    from dhf.run.records import read_runs
    from dhf.run.spectrum import read_spectrum

    if not args.runs and not args.spectrum:
        raise UsageError("there is nothing to draw; give the directory of a run, or --spectrum FILE")
    steps = None if args.solves is None else positive_whole_numbers("--solves", args.solves)
    runs = read_runs(args.runs) if args.runs else []
    spectrum = None if args.spectrum is None else read_spectrum(args.spectrum)
    missing = sorted(set(steps or ()) - {solve["step"] for run in runs for solve in run.solves})
    if missing:
        raise UsageError(
            f"the solve of step {', '.join(map(str, missing))} was not recorded; train with --record-solves "
            f"{','.join(map(str, missing))}"
        )
    require_matplotlib()
    from dhf.run.pictures import Pictures

    default = Path("plots") if len(runs) != 1 else runs[0].path / "plots"
    folder = writable_folder(Path(args.output) if args.output else default)
    themes = ["light", "dark"] if args.theme == "both" else [args.theme]
    formats = ["png", "svg"] if args.format == "both" else [args.format]
    pictures = Pictures(folder, themes, formats)
    if runs:
        pictures.of_runs(runs, steps)
    if spectrum is not None:
        pictures.of_spectrum(spectrum)
    if len(runs) == 1 and not args.no_problem:
        note = pictures.of_problem(runs[0])
        if note:
            print(note, file=sys.stderr)
    for path in pictures.paths:
        print(path)


if __name__ == "__main__":
    sys.exit(main())
