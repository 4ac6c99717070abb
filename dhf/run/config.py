"""Config: every setting of ``python -m dhf.train``, from a YAML file and the command line. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jsonargparse
import yaml

from dhf.byte_size import parse_bytes
from dhf.errors import UsageError
from dhf.run.chosen import check_chosen
from dhf.run.flags import Group, add_fields, in_words, make_parser, make_settings_parser, nearest
from dhf.run.signals import signal_number

__all__ = ["PHASE_SETTINGS", "PROBLEMS", "WATCHING", "Config", "idle_settings", "make_config", "parse", "to_yaml"]

_USAGE = "python -m dhf.train [--config FILE] [--SETTING VALUE ...]"

_DESCRIPTION = """\
Train a model by distributed Hessian-free optimisation. Started by torchrun, srun or mpirun, every process is a rank; started
alone, it is one process that does the same, for debugging.

  python -m dhf.train
  torchrun --nproc_per_node=4 -m dhf.train --steps 50 --run-dir runs/first
  torchrun --nproc_per_node=4 -m dhf.train --problem my_problem.py:build --options.width 128
  python -m dhf.train --phases '[{optimizer: adam, steps: 200, batch_size: 100}, {optimizer: hf, steps: 20}]'

"""

PROBLEMS = """\
Built-in problems: digits-autoencoder, digits-classifier, curves-autoencoder, mnist-autoencoder (IDX files from
--options.folder), adding-rnn, poisson-pinn, convection-pinn, logistic; --options.KEY sets what their functions take.
A problem file is Python code, and is run.
"""

_EPILOG = """\
phases: each has steps, and may have an optimizer, time_budget (seconds; it ends when either is reached), batch_size,
micro_batch_size, learning_rate and any setting of Hessian-free. What a phase leaves out is what is given outside the
list. Each starts its optimizer anew where the last one has left the parameters; steps are counted through all of them.

torchrun takes --monitor for its own --monitor-interval, unless told where its flags end: torchrun ... -m -- dhf.train.

exit codes: 0 done, 2 usage, 3 diverged, 4 target not reached (with --error-if-not-converged), 5 communication or rank
failure, 75 stopped after a checkpoint by a signal, or for the end of a SLURM job. torchrun turns all but 0 into 1;
result.json, of a run that has started, keeps the code.
"""

_STEPS = 35

_data = Group("problem and data")
_method = Group("optimizer")
_hf = Group("Hessian-free", "what is not given is the preset's")
_ranks = Group("ranks")
_run = Group("run")
_watch = Group("watching")


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a run; the names are those of the flags, with underscores.

    None is the default that the help tells, or the preset's. ``phases`` holds mappings of PHASE_SETTINGS.
    """

    problem: str = _data("digits-autoencoder", "a built-in problem (above), or FILE.py:FUNCTION")
    options: dict = _data({}, "arguments of the problem's function: --options.KEY VALUE")
    batch_size: int | None = _data(None, "samples per step over all ranks; all of them by default")
    micro_batch_size: int | Literal["auto"] | None = _data(
        None,
        "samples differentiated at once; by default a rank's whole share, or the batch size of the problem's DataLoader; auto "
        "finds the fastest that fits into memory",
    )
    weight_decay: float | None = _data(
        None, "coefficient of half the squared norm of the parameters; the problem's own by default"
    )
    dtype: Literal["auto", "float32", "float64"] = _data("auto", "of parameters and data; auto is the problem's own")
    seed: int = _data(0, "names all random streams")

    optimizer: Literal["hf", "lbfgs", "adam"] = _method("hf", "Hessian-free, or one of torch's own for comparison")
    steps: int | None = _method(
        None, f"outer iterations; {_STEPS} by default, or those of all phases, which fewer cut short"
    )
    phases: list = _method([], "optimizers that follow one another, as a list of mappings (below)")
    learning_rate: float | None = _method(None, "of adam, by default 1e-3, and lbfgs, 1")

    preset: Literal["auto", "deep-net", "least-squares", "newton", "convex"] = _hf(
        "auto", "by kind of problem; auto looks at the objective and the dtype"
    )
    curvature: Literal["ggn", "hessian", "fisher"] | None = _hf(None, "matrix of the quadratic model")
    solver: Literal["auto", "cg", "cgls", "direct", "minres", "steihaug"] | None = _hf(
        None, "of each step's linear system; auto takes direct where it is cheaper"
    )
    preconditioner: Literal["auto", "none", "jacobi", "empirical-fisher", "kfac", "nystrom"] | None = _hf(
        None, "of the iterative solvers; auto is the preset's"
    )
    preconditioner_rank: int | None = _hf(None, "directions that nystrom samples")
    preconditioner_refresh: int | None = _hf(None, "steps between renewals of kfac and nystrom")
    globalisation: Literal["levenberg-marquardt", "nielsen", "trust-region"] | None = _hf(
        None, "how steps are kept within the reach of the quadratic model"
    )
    line_search: Literal["armijo", "grid"] | None = _hf(None, "of steps that are not taken whole")
    damping: float | None = _hf(None, "first damping; it adapts")
    damping_factor: float | None = _hf(None, "of Levenberg-Marquardt on the damping")
    damping_smallest: float | None = _hf(None, "least damping")
    radius: float | None = _hf(None, "first radius of a trust region; it adapts")
    cg_max_iterations: int | None = _hf(None, "most iterations of a solve")
    cg_rtol: float | None = _hf(None, "relative residual at which a solve stops")
    cg_forcing: bool | None = _hf(None, "whether forcing terms take the place of --cg-rtol")
    warm_start_decay: float | None = _hf(None, "multiple of the last solution at which a solve starts")
    curvature_fraction: float | None = _hf(None, "share of a step's samples that curvature is taken on")

    device: Literal["auto", "cpu", "cuda"] = _ranks("auto", "where ranks compute")
    backend: Literal["auto", "nccl", "gloo", "mpi", "serial"] = _ranks("auto", "how ranks talk")
    vectors: Literal["auto", "replicated", "sharded"] | None = _ranks(
        None, "what a rank holds of each vector of a solve: all, or a piece; auto looks at the memory"
    )
    bucket_mb: float | None = _ranks(
        None,
        "megabytes from which on the sum of a product over ranks starts early, in parts: 0.25 on slow networks; 0 is off",
    )
    reduce_dtype: Literal["full", "bfloat16"] | None = _ranks(None, "in which ranks send products of cg")
    products: Literal["retained", "traced", "compiled", "auto"] | None = _hf(
        None, "how products are taken: on autograd's graph, by a recording, by a compiled one; auto goes by the layers"
    )
    retain: int | str | None = _ranks(
        None,
        "graphs kept during a solve: all, none, as many as fit into a size such as 2GiB on each rank, or auto (by default)",
    )
    threads: int | None = _ranks(None, "threads per rank; the cores shared out by default")
    timeout: float = _ranks(300.0, "seconds to wait for a rank before giving up")
    deterministic: bool = _ranks(False, "use torch's deterministic algorithms")

    time_budget: float | None = _run(
        None, "seconds of training, counted anew after a resume, at which the run stops with a checkpoint"
    )
    target_loss: float | None = _run(None, "stop when the training loss is at or below this")
    error_if_not_converged: bool = _run(False, "exit with 4 if the target loss was not reached")
    run_dir: str | None = _run(None, "where the run is written; runs/PROBLEM-TIME by default")
    overwrite: bool = _run(False, "replace the run that the run directory holds")
    resume: str = _run("off", "off; auto, from the run directory's newest checkpoint if there is one; or a PATH")
    checkpoint_every: int = _run(25, "steps between checkpoints; 0 for one at the end only")
    keep_checkpoints: int = _run(3, "how many of the newest checkpoints are kept")
    stop_signals: str = _run(
        "SIGTERM,SIGINT,SIGUSR2", "signals on which the run saves and stops; a second one ends it at once"
    )
    debug_nonfinite: bool = _run(False, "search for the sample where a loss, gradient or product is not finite")
    dry_run: bool = _run(False, "print sizes, memory and shards, and stop")

    monitor: Literal["steps", "cg"] = _watch("steps", "what is shown: steps, or each iteration of their solves, too")
    profile: bool = _watch(False, "measure where each step's time goes, by phase and rank; a GPU is then waited for")
    record_solves: int | str = _watch(
        "auto",
        "steps whose solves leave their residuals in solves.jsonl: 1,5,10; all; none; auto is 1, 2, 5, 10, ... of each phase",
    )
    tensorboard: bool = _watch(False, "write events for TensorBoard into the run directory, too")


WATCHING = tuple(f.name for f in dataclasses.fields(Config) if f.metadata["group"] is _watch)


_NAMES = tuple(field.name for field in dataclasses.fields(Config))
PHASE_SETTINGS = (
    *(f.name for f in dataclasses.fields(Config) if f.metadata["group"] in (_method, _hf) and f.name != "phases"),
    "time_budget",
    "batch_size",
    "micro_batch_size",
)


def parse(argv: Sequence[str] | None = None) -> Config:
    """The configuration from the command line (``sys.argv`` by default) and the ``--config`` file in it.

    Raises:
        UsageError: If a key or value is unknown or out of range.
        SystemExit: After ``--help`` and ``--print-config``.
    """
    found = in_words(lambda: _parser().parse_args(argv), _NAMES).as_dict()
    found.pop("config", None)
    return make_config(found)


def make_config(found: Mapping[str, Any]) -> Config:
    """The configuration with what a parser has found of its fields, and defaults for the others.

    Raises:
        UsageError: If a value is out of range.
    """
    options = {key: _value(text) for key, text in (found.get("options") or {}).items()}
    phases = [_phase(number, given) for number, given in enumerate(found.get("phases") or [], 1)]
    config = Config(**{**found, "options": options, "phases": phases})
    if config.steps is None and not phases:
        config = dataclasses.replace(config, steps=_STEPS)
    _check(config)
    _check_phases(config)
    return config


def idle_settings(config: Config) -> list[str]:
    """What is said of the settings that are given, and that no optimizer they are given to takes."""
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(Config)}
    defaults = {f.name: f.default for f in dataclasses.fields(Config)}
    outside = [name for name, value in given.items() if value != defaults[name]]
    parts = [("", outside, {phase.get("optimizer", config.optimizer) for phase in config.phases or [{}]})]
    for number, phase in enumerate(config.phases, 1):
        parts.append((f"phase {number}: ", list(phase), {phase.get("optimizer", config.optimizer)}))
    words = []
    for prefix, names, optimizers in parts:
        own = [name for name in names if _takers(name) and not _takers(name) & optimizers]
        if own:
            flags = ", ".join(name if prefix else f"--{name.replace('_', '-')}" for name in own)
            words.append(f"{prefix}not used by {' or '.join(sorted(optimizers))}: {flags}")
    return words


def _takers(name: str) -> set[str]:
    """The optimizers that take a setting, or none if it is of all."""
    if name == "learning_rate":
        return {"adam", "lbfgs"}
    return {"hf"} if Config.__dataclass_fields__[name].metadata["group"] is _hf else set()


def to_yaml(config: Config) -> str:
    """The configuration as a YAML file that ``--config`` takes."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def _parser() -> jsonargparse.ArgumentParser:
    parser = make_settings_parser(
        prog="python -m dhf.train",
        usage=_USAGE,
        description=f"{_DESCRIPTION}{PROBLEMS}",
        epilog=_EPILOG,
    )
    add_fields(parser, Config)
    return parser


def _phase(number: int, given: Any) -> dict[str, Any]:
    """A phase's settings, as the flags of the same names would read them."""
    if not isinstance(given, dict):
        raise UsageError(f"phase {number} must be a mapping such as {{optimizer: adam, steps: 200}}, got {given!r}")
    for key in given:
        if key in _NAMES and key not in PHASE_SETTINGS:
            raise UsageError(f"phase {number}: {key} holds for the whole run; give it outside the phases")
        if key not in PHASE_SETTINGS:
            hint = nearest(str(key), PHASE_SETTINGS) or f"a phase may have {', '.join(PHASE_SETTINGS)}"
            raise UsageError(f"phase {number}: unknown setting {key}; {hint}")
    if given.get("steps") is None:
        raise UsageError(f"phase {number} has no steps; add how many it takes, for example steps: 20")
    parser = make_parser()
    add_fields(parser, Config, PHASE_SETTINGS)
    try:
        found = in_words(lambda: parser.parse_object(given), PHASE_SETTINGS)
    except UsageError as error:
        raise UsageError(f"phase {number}: {error}") from None
    return {key: found[key] for key in given}


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


def _check_phases(config: Config) -> None:
    for number, phase in enumerate(config.phases, 1):
        try:
            _check(dataclasses.replace(config, **phase))
        except UsageError as error:
            raise UsageError(f"phase {number}: {error}") from None
    total = sum(phase["steps"] for phase in config.phases)
    if config.phases and config.steps is not None and config.steps > total:
        raise UsageError(f"--steps {config.steps} is more than the {total} steps of all phases; give the phases more")


def _check(config: Config) -> None:
    positive = (
        "damping",
        "damping_factor",
        "damping_smallest",
        "radius",
        "preconditioner_rank",
        "preconditioner_refresh",
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
        if value is not None and value != "auto" and not 0 < value < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} must be positive and finite, got {value}")
    for name in ("steps", "checkpoint_every", "weight_decay", "seed"):
        value = getattr(config, name)
        if value is not None and not value >= 0:
            raise UsageError(f"--{name.replace('_', '-')} must not be negative, got {value}")
    if config.curvature_fraction is not None and not 0 < config.curvature_fraction <= 1:
        raise UsageError(f"--curvature-fraction must be in (0, 1], got {config.curvature_fraction}")
    if config.cg_rtol is not None and not 0 <= config.cg_rtol < 1:
        raise UsageError(f"--cg-rtol must be in [0, 1), got {config.cg_rtol}")
    if config.retain is not None and config.retain not in ("all", "none", "auto"):
        size = parse_bytes(str(config.retain))
        if size is None or (isinstance(config.retain, int) and config.retain < 0):
            raise UsageError(
                f"--retain {config.retain} is unknown; give all, none, auto, or a size such as 2GiB or 500MB"
            )
    if config.target_loss is not None and not math.isfinite(config.target_loss):
        raise UsageError(f"--target-loss must be finite, got {config.target_loss}")
    check_chosen(str(config.record_solves))
    for name in config.stop_signals.split(","):
        try:
            signal_number(name)
        except ValueError as error:
            raise UsageError(f"--stop-signals: {error}; give names such as SIGTERM,SIGUSR2") from None
    if config.overwrite and config.resume != "off":
        raise UsageError("--overwrite starts anew and --resume goes on: give one of them")
    if config.error_if_not_converged and config.target_loss is None:
        raise UsageError("--error-if-not-converged needs a --target-loss to reach")
