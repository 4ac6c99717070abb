"""The registry: built-in problems by name, and ``FILE.py:FUNCTION`` for a user's own."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dhf.errors import UsageError
from dhf.problems.problem import Problem

__all__ = ["build_problem", "problem_names"]

_BUILT_IN = {
    "digits-autoencoder": "dhf.problems.digits:autoencoder",
    "digits-classifier": "dhf.problems.digits:classifier",
    "logistic": "dhf.problems.logistic:logistic",
    "curves-autoencoder": "dhf.problems.curves:autoencoder",
    "mnist-autoencoder": "dhf.problems.mnist:autoencoder",
    "adding-rnn": "dhf.problems.adding_rnn:adding_rnn",
    "poisson-pinn": "dhf.problems.pinn:poisson",
    "convection-pinn": "dhf.problems.pinn:convection",
}

# what an annotation of an option's argument admits, itself or as text of a file with postponed annotations
_PLAIN: dict[Any, tuple[tuple[type, ...], str]] = {
    kind: found
    for plain, found in {
        int: ((int,), "a whole number"),
        float: ((int, float), "a number"),
        bool: ((bool,), "true or false"),
    }.items()
    for kind in (plain, plain.__name__)
}


def problem_names() -> list[str]:
    """The names of the built-in problems."""
    return list(_BUILT_IN)


def build_problem(name: str, options: Mapping[str, Any]) -> Problem:
    """Build a problem by name, or by ``FILE.py:FUNCTION``, whose code is run.

    Args:
        name: A built-in name, or a path to a Python file, a colon, and a function in it.
        options: Keyword arguments for the function.

    Raises:
        UsageError: If the name, file, function or an option is unknown, or no Problem comes back.
    """
    build = _find(name)
    _check_options(name, build, options)
    problem = build(**options)
    if not isinstance(problem, Problem):
        raise UsageError(f"{name} returned {type(problem).__name__}, not a dhf.Problem")
    return problem


def _find(name: str) -> Callable[..., Problem]:
    path, _, function = name.rpartition(":")
    if name in _BUILT_IN:
        module, _, function = _BUILT_IN[name].partition(":")
        return getattr(importlib.import_module(module), function)
    if not path.endswith(".py"):
        near = difflib.get_close_matches(name, _BUILT_IN, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(
            f"problem {name!r} is unknown; {hint}choose from {', '.join(_BUILT_IN)}, or give FILE.py:FUNCTION"
        )
    if not Path(path).is_file():
        raise UsageError(f"problem file {path!r} does not exist")
    module = _load(Path(path))
    if not callable(getattr(module, function, None)):
        found = [n for n, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__]
        raise UsageError(f"{path} has no function {function!r}; it has {', '.join(found) or 'none'}")
    return getattr(module, function)


def _load(path: Path) -> Any:
    name = f"dhf_problem_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module


def _check_options(name: str, build: Callable[..., Problem], options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(build).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for key in options:
        if key not in parameters:
            near = difflib.get_close_matches(key, parameters, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UsageError(
                f"{name} has no option {key!r}; {hint}it has {', '.join(parameters) or 'none'}: --options.KEY VALUE"
            )
    missing = [k for k, p in parameters.items() if p.default is p.empty and k not in options]
    if missing:
        raise UsageError(f"{name} needs --options.{missing[0]} VALUE")
    for key, value in options.items():
        kinds, words = _PLAIN.get(parameters[key].annotation, ((), ""))
        if kinds and value is not None and type(value) not in kinds:
            raise UsageError(f"{key} must be {words}, got {value!r}; set it by --options.{key}")
