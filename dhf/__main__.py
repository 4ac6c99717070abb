"""python -m dhf COMMAND, and the console script dhf: find the command, and hand it its flags. Imports no torch.

A command is a module with ``main(argv)``, which returns the exit code; a new one is a line of the table.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from dhf.run.entry import complain
from dhf.run.outcome import EXIT_USAGE
from dhf.version import __version__

__all__ = ["COMMANDS", "main"]

# name -> (module, what it does)
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("dhf.train", "train a model; the same as python -m dhf.train"),
    "solve": (
        "dhf.commands.solve",
        "solve (A + damping I) x = b with a problem's Hessian, Gauss-Newton or Fisher matrix",
    ),
    "spectrum": ("dhf.commands.spectrum", "find eigenvalues, trace and density of such a matrix"),
    "influence": ("dhf.commands.influence", "tell which training samples help or harm the loss on chosen samples"),
    "doctor": ("dhf.commands.doctor", "look at this machine, the ranks and a problem, and say what to change"),
    "plot": ("dhf.commands.plot", "draw runs, and a spectrum"),
    "compare": ("dhf.commands.compare", "compare runs in a table"),
    "export": ("dhf.commands.export", "write a run's metrics as CSV"),
}

_HELP = """\
usage: python -m dhf COMMAND [--FLAG VALUE ...]

dhf {version}: distributed Hessian-free optimisation and curvature solves for PyTorch.

{commands}

  python -m dhf COMMAND --help                       flags, exit codes and examples of a command
  python -m dhf doctor                               is this machine ready?
  python -m dhf doctor --problem my_problem.py:build
  python -m dhf solve --problem digits-classifier --damping 1e-2 --output x.pt
  torchrun --nproc_per_node=4 -m dhf spectrum --at runs/first --largest 10 --output spectrum.json
  python -m dhf influence --at runs/first --queries 0,5,10-14
  python -m dhf plot runs/first

Started by torchrun, srun or mpirun, every process is a rank; started alone, it is one process that does the same.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code, 2 for a command that does not exist."""
    name, *flags = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(_help(), end="")
        return 0
    if name == "--version":
        print(f"dhf {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(COMMANDS)}"
        return complain(ValueError(f"unknown command {name!r}; {hint}"), EXIT_USAGE)
    try:
        return importlib.import_module(COMMANDS[name][0]).main(flags)
    except SystemExit as end:  # of --help
        return end.code if isinstance(end.code, int) else EXIT_USAGE


def _help() -> str:
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:<{width}}{summary}" for name, (_, summary) in COMMANDS.items())
    return _HELP.format(version=__version__, commands=commands)


if __name__ == "__main__":
    sys.exit(main())
