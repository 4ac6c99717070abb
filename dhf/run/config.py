"""Config: every setting of ``python -m dhf.train``, from a YAML file and the command line. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, Optional, get_type_hints

import jsonargparse
import yaml

from dhf.errors import UsageError
from dhf.run.signals import signal_number

__all__ = ["Config", "parse", "to_yaml"]

_DESCRIPTION = """\
Train a model by distributed Hessian-free optimisation. Started by torchrun, every process is a rank; started alone, it is
one process that does the same, for debugging.

  python -m dhf.train
  torchrun --nproc_per_node=4 -m dhf.train --steps 50 --run-dir runs/first
  torchrun --nproc_per_node=4 -m dhf.train --problem my_problem.py:build --options.width 128

A problem file is Python code, and is run.
"""

_EPILOG = """\
exit codes: 0 done, 2 usage, 3 diverged, 4 target not reached (with --error-if-not-converged), 5 communication or rank
failure, 75 stopped after a checkpoint by a signal, or for the end of a SLURM job. torchrun turns all but 0 into 1;
result.json, of a run that has started, keeps the code.
"""


def _flag(default: Any, text: str) -> Any:
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run; the names are those of the flags, with underscores."""

    problem: str = _flag("digits-autoencoder", "digits-autoencoder, digits-classifier, or FILE.py:FUNCTION")
    options: dict = _flag({}, "arguments of the problem's function: --options.KEY VALUE")
    steps: int = _flag(35, "outer iterations")
    time_budget: Optional[float] = _flag(None, "seconds of training after which the run stops with a checkpoint")  # noqa: UP045
    target_loss: Optional[float] = _flag(None, "stop when the training loss is at or below this")  # noqa: UP045
    optimizer: Literal["hf", "lbfgs", "adam"] = _flag("hf", "Hessian-free, or one of torch's own for comparison")
    learning_rate: Optional[float] = _flag(None, "of adam (1e-3) and lbfgs (1)")  # noqa: UP045
    curvature: Literal["ggn", "hessian", "fisher"] = _flag("ggn", "matrix of the quadratic model")
    preconditioner: Literal["auto", "none", "jacobi"] = _flag("auto", "of CG; auto is none so far")
    solver: Literal["cg"] = _flag("cg", "of the linear system of each step")
    damping: float = _flag(1.0, "first Levenberg-Marquardt damping; it adapts")
    cg_max_iterations: int = _flag(250, "most CG iterations per step")
    cg_rtol: float = _flag(1e-8, "relative residual at which CG stops; its relative-progress rule usually comes first")
    batch_size: Optional[int] = _flag(None, "samples per step over all ranks; all of them by default")  # noqa: UP045
    micro_batch_size: Optional[int] = _flag(None, "samples differentiated at once; a rank's whole share by default")  # noqa: UP045
    curvature_fraction: float = _flag(1.0, "share of a step's samples that curvature is taken on")
    weight_decay: float | None = _flag(
        None, "coefficient of half the squared norm of the parameters; the problem's own by default"
    )
    device: Literal["auto", "cpu", "cuda"] = _flag("auto", "where ranks compute")
    backend: Literal["auto", "nccl", "gloo", "serial"] = _flag("auto", "how ranks talk")
    threads: Optional[int] = _flag(None, "threads per rank; the cores shared out by default")  # noqa: UP045
    timeout: float = _flag(300.0, "seconds to wait for a rank before giving up")
    dtype: Literal["float32", "float64"] = _flag("float32", "of parameters and data")
    seed: int = _flag(0, "names all random streams")
    deterministic: bool = _flag(False, "use torch's deterministic algorithms")
    run_dir: Optional[str] = _flag(None, "where the run is written; runs/PROBLEM-TIME by default")  # noqa: UP045
    resume: str = _flag("off", "off; auto, from the run directory's newest checkpoint if there is one; or a PATH")
    checkpoint_every: int = _flag(25, "steps between checkpoints; 0 for one at the end only")
    keep_checkpoints: int = _flag(3, "how many of the newest checkpoints are kept")
    stop_signals: str = _flag(
        "SIGTERM,SIGINT,SIGUSR2", "signals on which the run saves and stops; a second one ends it at once"
    )
    debug_nonfinite: bool = _flag(False, "search for the sample where a loss, gradient or product is not finite")
    overwrite: bool = _flag(False, "replace the run that the run directory holds")
    dry_run: bool = _flag(False, "print sizes, memory and shards, and stop")
    error_if_not_converged: bool = _flag(False, "exit with 4 if the target loss was not reached")


def parse(argv: Sequence[str] | None = None) -> Config:
    """The configuration from the command line (``sys.argv`` by default) and the ``--config`` file in it.

    Raises:
        UsageError: If a key or value is unknown or out of range.
        SystemExit: After ``--help`` and ``--print-config``.
    """
    parser = _parser()
    try:
        found = parser.parse_args(argv).as_dict()
    except (jsonargparse.ArgumentError, argparse_error()) as error:
        _refuse(str(error))
    found.pop("config", None)
    found["options"] = {key: _value(text) for key, text in found["options"].items()}
    config = Config(**found)
    _check(config)
    return config


def to_yaml(config: Config) -> str:
    """The configuration as a YAML file that ``--config`` takes."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def argparse_error() -> type[Exception]:
    """The error argparse itself raises."""
    import argparse

    return argparse.ArgumentError


def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog="python -m dhf.train",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        print_config="--print-%s",
        exit_on_error=False,
        formatter_class=_formatter(),
    )
    parser.add_argument("--config", action="config", help="YAML file with any of the settings below, under these names")
    hints = get_type_hints(Config)
    for field in dataclasses.fields(Config):
        flag = "--" + field.name.replace("_", "-")
        text = field.metadata["help"]
        if field.type in ("bool", bool):
            parser.add_argument(flag, action="store_true", help=text)
        else:
            default = {} if field.name == "options" else field.default
            parser.add_argument(flag, type=hints[field.name], default=default, help=text)
    return parser


def _formatter() -> type:
    from jsonargparse import DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        """Keeps the line breaks of description and epilog."""

        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return text

    return Formatter


def _refuse(text: str) -> NoReturn:
    """Say an argument parser's error in one line, with the nearest known name."""
    text = " ".join(text.split())
    unknown = re.search(r"unrecognized arguments?: (\S+)|Option '([^']+)' is not accepted", text, re.IGNORECASE)
    if unknown is None:
        raise UsageError(_plain_type_error(text))
    name = (unknown[1] or unknown[2]).partition("=")[0]
    known = [f.name for f in dataclasses.fields(Config)]
    near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), known, 1)
    hint = f"did you mean {_like(name, near[0])}?" if near else "--help lists the settings"
    raise UsageError(f"unknown setting {name}; {hint}")


def _plain_type_error(text: str) -> str:
    """jsonargparse's account of a value of the wrong type, without Python's names of types."""
    text = re.sub(r'^Parser key "(\w+)": ?', lambda m: "--" + m[1].replace("_", "-") + ": ", text)
    flag, _, rest = text.partition(": ")
    value = re.search(r"(?:Got|Given) value: (.*)$", rest)
    choices = re.match(r"Expected a typing\.Literal\[([^]]*)\]", rest)
    number = re.search(r"<class '(int|float)'>", rest)
    if value and choices:
        return f"{flag} {value[1]!r} is unknown; choose from {choices[1].replace(chr(39), '')}"
    if value and number:
        return f"{flag} must be {'an integer' if number[1] == 'int' else 'a number'}, got {value[1]!r}"
    return text


def _like(name: str, near: str) -> str:
    return "--" + near.replace("_", "-") if name.startswith("-") else near


def _value(text: Any) -> Any:
    """The value of a problem's option: a number, a boolean, null or a list where it reads as one, else the text."""
    if not isinstance(text, str):
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _check(config: Config) -> None:
    positive = (
        "damping",
        "timeout",
        "time_budget",
        "batch_size",
        "micro_batch_size",
        "threads",
        "learning_rate",
        "cg_max_iterations",
        "keep_checkpoints",
    )
    for name in positive:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name.replace('_', '-')} must be positive, got {value}")
    for name in ("steps", "checkpoint_every", "weight_decay", "seed"):
        value = getattr(config, name)
        if value is not None and not value >= 0:
            raise UsageError(f"--{name.replace('_', '-')} must not be negative, got {value}")
    if not 0 < config.curvature_fraction <= 1:
        raise UsageError(f"--curvature-fraction must be in (0, 1], got {config.curvature_fraction}")
    if not 0 <= config.cg_rtol < 1:
        raise UsageError(f"--cg-rtol must be in [0, 1), got {config.cg_rtol}")
    if config.target_loss is not None and not math.isfinite(config.target_loss):
        raise UsageError(f"--target-loss must be finite, got {config.target_loss}")
    for name in config.stop_signals.split(","):
        try:
            signal_number(name)
        except ValueError as error:
            raise UsageError(f"--stop-signals: {error}; give names such as SIGTERM,SIGUSR2") from None
    if config.overwrite and config.resume != "off":
        raise UsageError("--overwrite starts anew and --resume goes on: give one of them")
    if config.error_if_not_converged and config.target_loss is None:
        raise UsageError("--error-if-not-converged needs a --target-loss to reach")
