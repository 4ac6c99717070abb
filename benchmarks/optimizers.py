"""dhf against what else minimises the same objectives: time to a target, and values after equal time.

    python benchmarks/optimizers.py [--problems a,b] [--contenders dhf,adam] [--seeds 0,1,2] [--quick] [--budget-scale X]
    python benchmarks/optimizers.py --report        # draws and writes the pages again, from the numbers on disk

Each run is a process of one thread, one after another, timed in its CPU seconds. What it measures (the full training loss, an
error, a gradient norm) is not counted, nor are imports and the first iteration's one-time work: the contender takes one
uncounted iteration on a copy of the problem before. Where a contender has several settings (Adam's learning rates), all are
tried on the first seed for a quarter of the time limit, the best two for all of it, and the best one is run on the other seeds.

The numbers of a problem and contender replace those on disk; all others are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from baselines import CONTENDERS, Finished, Recorder, Task, regularised_loss
from measure import RESULTS, environment
from optimizers_report import seconds_to, write_report

import dhf
from dhf.problems import Problem, Shard, build_problem

_NEWTON = ("scipy-trust-ncg", "scipy-newton-cg", "torchmin-trust-ncg", "torchmin-newton-cg")
_QUASI_NEWTON = ("lbfgs", "scipy-l-bfgs", "torchmin-l-bfgs")
_ADAM = ("adam", "adam-minibatch")
# what is far from a physics-informed network's target after this long is not given the whole limit
_SLOW = dict.fromkeys(("adam", "torchmin-l-bfgs", *_NEWTON), 10.0)


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem, and what is asked of it.

    Attributes:
        problem: Name of a built-in problem.
        contenders: Names in CONTENDERS.
        limit: CPU seconds of a run.
        measure: What is recorded, from the problem's metrics or ``loss``; the first is compared.
        target: Value to reach.
        times: CPU seconds at which values are compared.
        options: Keyword arguments of the problem.
        limits: Other limits for single contenders.
        weight_decay: Coefficient of the objective; None for the problem's own.
        batch: Samples per step of dhf; None for all.
        seeded: Whether the problem's option ``seed`` is that of the run, since its starting point is fixed.
    """

    problem: str
    contenders: tuple[str, ...]
    limit: float
    measure: tuple[str, ...] = ("loss",)
    target: float | None = None
    times: tuple[float, ...] = ()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    limits: dict[str, float] = dataclasses.field(default_factory=dict)
    weight_decay: float | None = None
    batch: int | None = None
    seeded: bool = False


CASES = {
    "digits-autoencoder": Case("digits-autoencoder", ("dhf", *_ADAM, "lbfgs"), limit=24, target=16.0, times=(12.0,)),
    "logistic": Case(
        "logistic",
        ("dhf", "dhf-cg", "adam", *_QUASI_NEWTON, *_NEWTON, "sklearn-newton"),
        limit=40,
        measure=("gradient_norm_after",),
        target=1e-10,
        dtype="float64",
        limits={"adam": 10, **dict.fromkeys(_QUASI_NEWTON, 15.0)},
        seeded=True,
    ),
    "poisson-pinn": Case(
        "poisson-pinn",
        ("dhf", "dhf-cgls", "adam", *_QUASI_NEWTON, *_NEWTON, "scipy-lm"),
        limit=50,
        measure=("relative_l2_error",),
        target=3e-6,
        times=(20.0, 50.0),
        dtype="float64",
        limits=_SLOW,
    ),
    "poisson-pinn-large": Case(
        "poisson-pinn",
        ("dhf", "dhf-cgls", "adam", "lbfgs", "scipy-trust-ncg"),
        limit=120,
        measure=("relative_l2_error",),
        target=1e-5,
        times=(60.0, 120.0),
        options={"widths": [50, 50, 50]},
        dtype="float64",
        limits={"dhf-cgls": 180.0, "lbfgs": 60.0, "adam": 20.0, "scipy-trust-ncg": 20.0},
    ),
    "digits-classifier": Case(
        "digits-classifier",
        ("dhf", *_ADAM, *_QUASI_NEWTON, *_NEWTON),
        limit=20,
        target=0.0135,
        dtype="float64",
        weight_decay=1e-4,
    ),
    "curves-autoencoder": Case("curves-autoencoder", ("dhf", "adam-minibatch", "lbfgs"), limit=60, times=(20.0, 60.0)),
    "adding-rnn": Case(
        "adding-rnn",
        ("dhf", "adam-minibatch"),
        limit=60,
        measure=("mse", "error_rate"),
        times=(20.0, 60.0),
        batch=1000,
    ),
}


def build(case: Case, seed: int) -> Problem:
    """The problem at the starting point that the seed names."""
    dtype, before = getattr(torch, case.dtype), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(seed)
    try:
        problem = build_problem(case.problem, case.options | ({"seed": seed} if case.seeded else {}))
    finally:
        torch.set_default_dtype(before)
    problem.objective.module.to(dtype=dtype)
    if case.weight_decay is not None:
        problem.objective.weight_decay = case.weight_decay
    return problem


def measuring(case: Case, problem: Problem) -> Callable[[], dict[str, float]]:
    """What gives a run's values by name."""
    module, metrics = problem.objective.module, problem.metrics
    if case.measure != ("loss",):
        assert metrics is not None
        return lambda: {key: value for key, value in metrics(module).items() if key in case.measure}
    data = Shard(problem.train, 0, 1, device=torch.device("cpu"), dtype=getattr(torch, case.dtype)).batches(0)[0]

    def loss() -> dict[str, float]:
        with torch.no_grad():
            return {"loss": float(regularised_loss(problem.objective, data))}

    return loss


def run_one(name: str, contender: str, seed: int, settings: dict[str, Any], limit: float) -> dict[str, Any]:
    """One run, in this process."""
    torch.set_flush_denormal(True)
    case = CASES[name]

    def attempt(limit: float) -> dict[str, Any]:
        problem = build(case, seed)
        recorder = Recorder(measuring(case, problem), limit, case.target, max(case.times, default=0.0))
        task = Task(problem, getattr(torch, case.dtype), seed, case.batch, recorder)
        try:
            ended = CONTENDERS[contender].run(task, **settings)
        except Finished as reason:
            ended = str(reason)
        recorder.stop_clock()
        facts = {"seed": seed, "limit": limit, "ended": ended, "iterations": recorder.iterations}
        return {**facts, "points": recorder.points}

    attempt(0.0)
    return attempt(limit)


def in_own_process(name: str, contender: str, seed: int, settings: dict[str, Any], limit: float) -> dict[str, Any]:
    """One run in a process of its own; ``{"error": ...}`` if it failed."""
    command = [sys.executable, __file__, "--one", name, contender, str(seed), json.dumps(settings), str(limit)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"seed": seed, "limit": limit, "error": lines[-1].removeprefix("dhf.errors.UsageError: ")}
    return json.loads(done.stdout.splitlines()[-1])


def compete(name: str, contender: str, seeds: list[int], scale: float, quick: bool) -> dict[str, Any]:
    """All runs of a contender on a problem: its settings on the first seed, then the best of them on every seed."""
    case, candidates = CASES[name], CONTENDERS[contender].settings
    limit = scale * case.limits.get(contender, case.limit)
    searched: list[dict[str, Any]] = []

    def run(seed: int, settings: dict[str, Any], limit: float) -> dict[str, Any]:
        found = in_own_process(name, contender, seed, settings, limit)
        summary = {"settings": settings, "limit": limit, **_summary(case, found)}
        if seed == seeds[0]:
            searched.append(summary)
        print(f"  {contender:<20} seed {seed}  {_told(summary)}  {json.dumps(settings)}", flush=True)
        return found

    if len(candidates) > 2:
        candidates = sorted(candidates, key=lambda settings: _score(case, run(seeds[0], settings, limit / 4)))[:2]
    tried = [(run(seeds[0], settings, limit), settings) for settings in candidates]
    first, settings = min(tried, key=lambda pair: _score(case, pair[0]))
    once = "error" in first or (quick and math.isinf(_score(case, first)[0]) and not contender.startswith("dhf"))
    others = [] if once else [run(seed, settings, limit) for seed in seeds[1:]]
    return {
        "environment": environment(torch.device("cpu")),
        "limit": limit,
        "settings": settings,
        "searched": searched if len(searched) > 1 else [],
        "runs": [first, *others],
    }


def _summary(case: Case, run: dict[str, Any]) -> dict[str, Any]:
    if "error" in run:
        return {"error": run["error"]}
    reached = seconds_to(run, case.measure[0], case.target)
    return {"seconds_to_target": reached, "value": run["points"][case.measure[0]][-1], "ended": run["ended"]}


def _score(case: Case, run: dict[str, Any]) -> tuple[float, float]:
    """What the best setting has least of: seconds to the target, then the last value."""
    summary = _summary(case, run)
    if "error" in summary:
        return math.inf, math.inf
    reached = summary["seconds_to_target"]
    return math.inf if reached is None else reached, summary["value"]


def _told(summary: dict[str, Any]) -> str:
    if "error" in summary:
        return summary["error"]
    reached = summary["seconds_to_target"]
    when = "" if reached is None else f"target after {reached:.3g} s, "
    return f"{when}{summary['value']:.4g} at the end ({summary['ended']})"


def store(path: Path, name: str, contender: str, entry: dict[str, Any]) -> None:
    """Put the numbers of one contender on one problem into the file, and leave the rest as it is."""
    payload = json.loads(path.read_text()) if path.exists() else {"problems": {}}
    case = CASES[name]
    problem = payload["problems"].setdefault(name, {"contenders": {}})
    facts = ("problem", "options", "dtype", "measure", "target", "times", "weight_decay", "batch")
    problem |= {key: getattr(case, key) for key in facts}
    problem["contenders"][contender] = entry
    payload["problems"] = {key: payload["problems"][key] for key in CASES if key in payload["problems"]}
    problem["contenders"] = {key: problem["contenders"][key] for key in CONTENDERS if key in problem["contenders"]}
    text = json.dumps(payload, indent=1)
    text = re.sub(r"\[([^\[\]{}]*)\]", lambda numbers: f"[{' '.join(numbers[1].split())}]", text)  # a list on one line
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def main() -> None:
    """Run what is asked for, and write the pages."""
    arguments = _arguments()
    torch.set_num_threads(1)
    if arguments.one:
        name, contender, seed, settings, limit = arguments.one
        print(json.dumps(run_one(name, contender, int(seed), json.loads(settings), float(limit))))
        return
    if not arguments.report:
        for name in arguments.problems:
            print(name, flush=True)
            try:
                build(CASES[name], 0)
            except dhf.UsageError as error:
                print(f"  left out: {error}", flush=True)
                continue
            for contender in arguments.contenders or CASES[name].contenders:
                if contender in CASES[name].contenders:
                    entry = compete(name, contender, arguments.seeds, arguments.budget_scale, arguments.quick)
                    store(arguments.output, name, contender, entry)
    for path in write_report(arguments.output):
        print(f"written {path}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def names(known: dict[str, Any]) -> Any:
        def parse(text: str) -> list[str]:
            unknown = set(text.split(",")) - set(known)
            if unknown:
                raise argparse.ArgumentTypeError(
                    f"{', '.join(sorted(unknown))} unknown; choose from {', '.join(known)}"
                )
            return text.split(",")

        return parse

    parser.add_argument("--problems", type=names(CASES), default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--contenders", type=names(CONTENDERS), help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--budget-scale", type=float, default=1.0, help="factor on all time limits")
    parser.add_argument(
        "--quick", action="store_true", help="only the first seed for what, dhf apart, misses the target there"
    )
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "optimizers-cpu.json", help="JSON file, kept up to date"
    )
    parser.add_argument(
        "--report", action="store_true", help="run nothing; write pages and pictures from the JSON file"
    )
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
