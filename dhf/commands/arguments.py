"""How the commands that read runs are called and refuse: one line on stderr, and exit code 2. Imports no torch or matplotlib."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jsonargparse

from dhf.errors import UsageError
from dhf.run.entry import own_rank
from dhf.run.flags import in_words, make_parser

__all__ = [
    "add_picture_flags",
    "command_parser",
    "positive_whole_numbers",
    "require_matplotlib",
    "run_command",
    "writable_folder",
]


def command_parser(name: str, usage: str, description: str, epilog: str) -> jsonargparse.ArgumentParser:
    """A parser for ``python -m dhf NAME``."""
    prog = f"python -m dhf {name}"
    return make_parser(prog=prog, usage=f"{prog} {usage}", description=description, epilog=epilog)


def add_picture_flags(parser: jsonargparse.ArgumentParser) -> None:
    """The flags of commands that draw: ``--theme`` and ``--format``."""
    parser.add_argument(
        "--theme",
        type=Literal["light", "dark", "both"],
        metavar="{light,dark,both}",
        default="light",
        help="ground of the pictures",
    )
    parser.add_argument(
        "--format", type=Literal["png", "svg", "both"], metavar="{png,svg,both}", default="png", help="of the files"
    )


def run_command(parser: jsonargparse.ArgumentParser, argv: Sequence[str] | None, work: Callable[[Any], None]) -> int:
    """Parse, and do the work on what was found; returns the exit code: 0, or 2 with one line on stderr.

    Runs are read by one process: under a launcher every rank but the first has nothing to do.
    """
    if own_rank() != "0":
        return 0
    try:
        known = [action.dest for action in parser._actions]
        work(in_words(lambda: parser.parse_args(argv), known))
        sys.stdout.flush()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except BrokenPipeError:  # who reads has seen enough; Python would complain when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def require_matplotlib() -> None:
    """Raise UsageError unless pictures can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("pictures need matplotlib; pip install 'dhf[plot]'")


def writable_folder(path: Path) -> Path:
    """The folder, made if it is not there.

    Raises:
        UsageError: If it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be made: {error.strerror or error}; give another --output") from None
    return path


def positive_whole_numbers(flag: str, text: str) -> list[int]:
    """The numbers of a list such as ``1,5,10``.

    Raises:
        UsageError: If it is no such list.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UsageError(f"{flag} must be steps such as 1,5,10, got {text!r}")
    return [int(part) for part in parts]
