"""Flags: a parser from the fields of a dataclass, its help, and its refusals in one line. Imports no torch."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import jsonargparse

from dhf.errors import UsageError

__all__ = ["Group", "add_fields", "in_words", "make_parser", "make_settings_parser", "nearest", "refused_in_words"]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Flags that stand together in the help.

    Attributes:
        title: Above them.
        text: Under the title.
    """

    title: str
    text: str = ""

    def __call__(self, default: Any, text: str) -> Any:
        """A field of a dataclass that is a flag of this group; ``text`` is its help, which tells what None stands for."""
        metadata = {"help": text, "group": self}
        if isinstance(default, (dict, list)):
            return dataclasses.field(default_factory=type(default), metadata=metadata)
        return dataclasses.field(default=default, metadata=metadata)


def make_parser(**options: Any) -> jsonargparse.ArgumentParser:
    """A parser that raises instead of exiting; options as argparse's."""
    return jsonargparse.ArgumentParser(exit_on_error=False, formatter_class=_Formatter, **options)


def make_settings_parser(**options: Any) -> jsonargparse.ArgumentParser:
    """The same, with ``--config FILE`` and ``--print-config``."""
    parser = make_parser(print_config="--print-%s", **options)
    parser.add_argument(
        "--config", action="config", metavar="FILE", help="YAML file with any of the settings below, under these names"
    )
    return parser


def add_fields(parser: jsonargparse.ArgumentParser, settings: type, names: Iterable[str] | None = None) -> None:
    """Give the parser a flag for each field of a dataclass, or for those of these names; booleans are switches."""
    hints, groups = get_type_hints(settings), {}
    chosen = None if names is None else set(names)
    for field in dataclasses.fields(settings):
        if chosen is not None and field.name not in chosen:
            continue
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group.title, group.text or None)
        flag, hint, text = "--" + field.name.replace("_", "-"), hints[field.name], field.metadata["help"]
        if hint is bool:
            groups[group].add_argument(flag, action="store_true", help=text)
        else:
            made = field.default_factory
            default = field.default if made is dataclasses.MISSING else made()
            groups[group].add_argument(flag, type=hint, default=default, metavar=_metavar(hint), help=text)


def in_words(parse: Callable[[], T], known: Iterable[str]) -> T:
    """What ``parse`` returns.

    Raises:
        UsageError: For what it refuses, in one line; a name that is not known gets the nearest of those that are.
    """
    try:
        return parse()
    except (jsonargparse.ArgumentError, argparse.ArgumentError) as error:
        raise UsageError(refused_in_words(str(error), known)) from None


def refused_in_words(text: str, known: Iterable[str]) -> str:
    """jsonargparse's account of what it refuses in one line, without Python's names of types."""
    text = " ".join(text.split())
    unknown = re.search(r"unrecognized arguments?: (\S+)|Option '([^']+)' is not accepted", text, re.IGNORECASE)
    if unknown is None:
        return _plain_type_error(text)
    name = (unknown[1] or unknown[2]).partition("=")[0]
    return f"unknown setting {name}; {nearest(name, known) or '--help lists the settings'}"


def nearest(name: str, known: Iterable[str]) -> str:
    """``did you mean ...?`` with the known name that is most like this one, as a flag if it is one; empty if none is."""
    near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), list(known), 1)
    if not near:
        return ""
    return f"did you mean {'--' + near[0].replace('_', '-') if name.startswith('-') else near[0]}?"


_KINDS: Mapping[str, str] = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list",
    "dict": "a mapping",
}


def _plain_type_error(text: str) -> str:
    text = re.sub(r'^Parser key "(\w+)": ?', lambda m: "--" + m[1].replace("_", "-") + ": ", text)
    flag, _, rest = text.partition(": ")
    value = re.search(r"(?:Got|Given) value: (.*)$", rest)
    choices = re.search(r"Expected a typing\.Literal\[([^]]*)\]", rest)
    kind = re.search(r"Expected a <class '(\w+)'>", rest)
    if value and kind and choices and kind[1] in _KINDS:
        return f"{flag} must be {_KINDS[kind[1]]} or {choices[1].replace(chr(39), '')}, got {value[1]!r}"
    if value and choices:
        return f"{flag} {value[1]!r} is unknown; choose from {choices[1].replace(chr(39), '')}"
    if value and kind and kind[1] in _KINDS:
        return f"{flag} must be {_KINDS[kind[1]]}, got {value[1]!r}"
    return text


def _metavar(hint: Any) -> str:
    """What stands for the value in the help."""
    if get_origin(hint) in (Union, types.UnionType):
        return "|".join(_metavar(kind) for kind in get_args(hint) if kind is not types.NoneType)
    if get_origin(hint) is Literal:
        return "{" + ",".join(get_args(hint)) + "}"
    return {int: "N", float: "X", str: "TEXT", bool: "{true,false}"}.get(hint, "YAML")


class _Formatter(jsonargparse.DefaultHelpFormatter):
    """Keeps the line breaks of description and epilog; names defaults that the text does not tell, and no types."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.splitlines())

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        told = default is None or default is False or default in (argparse.SUPPRESS, {}, [])
        return text if told else f"{text} (default: %(default)s)"
