"""read: a command's flags: those it shares with dhf.train, and its own. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from dhf.run.config import PROBLEMS, Config, make_config
from dhf.run.flags import add_fields, in_words, make_settings_parser

__all__ = ["DATA", "RANKS", "Asked", "begin", "read"]

if TYPE_CHECKING:
    from dhf.coordinator import Coordinator
    from dhf.run.monitor import Monitor
    from dhf.run.point import Point

T = TypeVar("T")

DATA = ("problem", "options", "batch_size", "micro_batch_size", "weight_decay", "dtype", "seed")
RANKS = ("device", "backend", "vectors", "retain", "threads", "timeout", "deterministic")


@dataclasses.dataclass(frozen=True, slots=True)
class Asked(Generic[T]):
    """What a command was asked for.

    Attributes:
        config: The settings that it shares with dhf.train; the others have their defaults.
        own: Its own.
        given: The names of those that the user has set.
    """

    config: Config
    own: T
    given: frozenset[str]


def read(
    argv: Sequence[str] | None,
    name: str,
    own: type[T],
    shared: Sequence[str],
    *,
    passed: Sequence[str] = (),
    description: str,
    epilog: str = "",
) -> Asked[T]:
    """The settings in a command line.

    Args:
        argv: The flags.
        name: Of the command.
        own: A dataclass of its own flags.
        shared: Which fields of the configuration are flags of it.
        passed: Which of its own, that have a help or a default of their own, are settings of the configuration, too.
        description: Above the flags in the help.
        epilog: Below them.

    Raises:
        UsageError: If a key or value is unknown or out of range.
        SystemExit: After ``--help``.
    """
    own_names = tuple(field.name for field in dataclasses.fields(own))  # type: ignore[arg-type]
    shared = tuple(n for n in shared if n not in own_names)
    parser = make_settings_parser(
        prog=f"python -m dhf {name}",
        usage=f"python -m dhf {name} [--config FILE] [--SETTING VALUE ...]",
        description=f"{description}\n{PROBLEMS}",
        epilog=epilog,
    )
    add_fields(parser, own)
    add_fields(parser, Config, shared)
    known = (*shared, *own_names)
    found = in_words(lambda: parser.parse_args(argv), known).as_dict()
    given = in_words(lambda: parser.parse_args(argv, defaults=False), known).as_dict()
    found.pop("config", None)
    mine = {key: value for key, value in found.items() if key in own_names}
    config = make_config({key: found[key] for key in (*shared, *passed) if found[key] is not None})
    return Asked(config, own(**mine), frozenset(given) - {"config"})


def begin(asked: Asked[Any], coordinator: Coordinator) -> tuple[Monitor, Point]:
    """Compare settings over the ranks, and go to the point that a command looks at; its own flags have ``at`` and ``json``.

    Collective. The monitor speaks on rank 0, unless it is to print JSON alone.

    Raises:
        RanksDifferError, UsageError: As :func:`dhf.run.point.take_place`.
    """
    from dhf.run.monitor import Monitor
    from dhf.run.point import take_place
    from dhf.run.preflight import require_same_settings

    require_same_settings(coordinator, asked.config, asked.own)
    monitor = Monitor(coordinator.comm.rank == 0 and not asked.own.json, "")
    return monitor, take_place(asked.config, asked.given, asked.own.at, coordinator, monitor.say)
