"""python -m dhf influence: which training samples help or harm the loss on chosen samples. Imports no torch at first."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dhf.commands.parsing import DATA, RANKS, begin, read
from dhf.commands.parsing import Asked as Flags
from dhf.errors import UsageError
from dhf.run.directory import plain, write_atomically
from dhf.run.entry import complain, on_ranks_together
from dhf.run.flags import Group
from dhf.run.outcome import EXIT_DONE, EXIT_TARGET, EXIT_USAGE, exit_code

if TYPE_CHECKING:
    from dhf.coordinator import Coordinator
    from dhf.run.influences import Scores
    from dhf.run.monitor import Monitor
    from dhf.run.point import Point

__all__ = ["InfluenceFlags", "main"]

_DESCRIPTION = """\
Tell, for some samples (queries), which training samples help and which harm: how much the loss on the query would rise, to first
order, were the training sample left out. One solve with the damped matrix for each query; all training samples are then scored.

  python -m dhf influence --at runs/first --queries 0,5,10-14
  python -m dhf influence --at runs/first --queries 17 --queries-from train --top 20 --output scores.csv
  python -m dhf influence --problem my_problem.py:build --queries 0 --parameters head --preconditioner nystrom
  torchrun --nproc_per_node=4 -m dhf influence --at runs/first --queries 0-9 --output scores.json
"""

_EPILOG = """\
Influence is meant for parameters near a minimum: give a run with --at. A sample's number is its place in the data set.
--output FILE.csv has a line for each query and sample shown; FILE.json those and the solves; FILE.npy all scores, shape
(queries, training samples).

exit codes: 0 done, 2 usage, 4 a solve has not converged (with --error-if-not-converged), 5 communication or rank failure,
75 stopped by a signal. torchrun turns all but 0 into 1.
"""

_queries = Group("queries")
_system = Group("system")
_output = Group("output")


@dataclasses.dataclass(frozen=True)
class InfluenceFlags:
    """The flags of influence alone."""

    at: str | None = _queries(
        None, "a run's directory, or a checkpoint: its parameters, and its problem unless one is given"
    )
    queries: str = _queries("0-4", "numbers of the samples asked for, such as 0,5,10-14")
    queries_from: Literal["validation", "train"] | None = _queries(
        None, "the set that they are in; validation by default, where the problem has one"
    )
    top: int = _queries(5, "training samples shown on either side")

    curvature: Literal["ggn", "hessian"] = _system("ggn", "the matrix")
    parameters: str | None = _system(None, "take the matrix in these alone: names or patterns, such as layers.0,*.bias")
    damping: float = _system(1e-3, "added to its diagonal")
    preconditioner: Literal["none", "jacobi", "empirical-fisher", "kfac", "nystrom"] = _system("none", "of the solves")
    preconditioner_rank: int | None = _system(None, "directions that nystrom samples")
    cg_rtol: float | None = _system(
        None, "relative residual at which a solve stops; 1e-6 in float64 and 1e-4 in float32 by default"
    )
    cg_max_iterations: int | None = _system(None, "most iterations of a solve; ten times the parameters by default")
    products: Literal["retained", "traced", "compiled", "auto"] = _system("auto", "how products are taken")

    output: str | None = _output(None, "a .json, .csv or .npy file for the scores")
    json: bool = _output(False, "print JSON in place of the report")
    error_if_not_converged: bool = _output(False, "exit with 4 unless all solves have converged")


def main(argv: Sequence[str] | None = None) -> int:
    """Score as the flags say; the exit code."""
    try:
        asked = read(
            argv,
            "influence",
            InfluenceFlags,
            (*(n for n in DATA if n != "batch_size"), *(n for n in RANKS if n != "vectors"), "debug_nonfinite"),
            passed=("preconditioner", "preconditioner_rank", "cg_rtol", "cg_max_iterations", "products"),
            description=_DESCRIPTION,
            epilog=_EPILOG,
        )
        _check(asked.own)
    except UsageError as error:
        return complain(error, EXIT_USAGE)
    return on_ranks_together(asked.config, lambda coordinator: _score(asked, coordinator))


def _check(own: InfluenceFlags) -> None:
    if own.top < 1:
        raise UsageError(f"--top must be at least 1, got {own.top}")
    if not 0 <= own.damping < math.inf:
        raise UsageError(f"--damping must be finite and not negative, got {own.damping}")
    if own.output is not None and Path(own.output).suffix not in (".json", ".csv", ".npy"):
        raise UsageError(f"--output {own.output} must end in .json, .csv or .npy")


def _score(flags: Flags[InfluenceFlags], coordinator: Coordinator) -> int:
    from dhf.parameters import Parameters
    from dhf.run.influences import RTOL, Asked, numbers_in, score_queries
    from dhf.run.point import sizes_in_words

    own, comm = flags.own, coordinator.comm
    leads = comm.rank == 0
    monitor, point = begin(flags, coordinator)
    held_out = _held_out(own, point)
    samples = point.parts.validation.samples if held_out and point.parts.validation else point.train.samples
    asked = Asked(
        held_out,
        numbers_in(own.queries, samples),
        own.curvature,
        own.damping,
        own.parameters,
        own.cg_rtol or RTOL[Parameters(point.objective.module).dtype],
        own.cg_max_iterations,
    )
    monitor.say(f"problem   {point.config.problem} at {point.where}, {comm.size} rank(s) over {comm.backend}")
    monitor.say(f"system    ({own.curvature} + {own.damping:g} I) for each query; {sizes_in_words(point)}")
    scores = score_queries(point, asked, coordinator)
    result = _result(point, own, comm.size, held_out, scores)
    written = coordinator.attempt(lambda: _write(own, result, scores) if leads else "")
    _report(monitor, own, held_out, scores, written)
    if own.json and leads:
        print(json.dumps(result, indent=2), flush=True)
    if coordinator.stopping is not None:
        return exit_code(coordinator.stopping)
    return EXIT_TARGET if own.error_if_not_converged and not scores.converged else EXIT_DONE


def _held_out(own: InfluenceFlags, point: Point) -> bool:
    """Whether queries are held-out samples."""
    if own.queries_from == "validation" and point.parts.validation is None:
        raise UsageError(f"{point.config.problem} has no validation data; use --queries-from train")
    return own.queries_from != "train" and point.parts.validation is not None


def _report(monitor: Monitor, own: InfluenceFlags, held_out: bool, scores: Scores, written: str) -> None:
    kind = "validation" if held_out else "train"
    for place, query in enumerate(scores.queries):
        solution = scores.solutions[place]
        monitor.say(
            f"query     {kind} {query}: loss {scores.losses[place]:.5g}; {solution.iterations} iterations, "
            f"{solution.reason.words}"
        )
        for label, found in zip(("helpful", "harmful"), scores.top(place, own.top), strict=True):
            shown = ", ".join(f"{sample} ({score:+.2e})" for sample, score in found) or "none"
            monitor.say(f"  {label} {shown}")
    if written:
        monitor.say(f"written   {written}")


def _result(point: Point, own: InfluenceFlags, ranks: int, held_out: bool, scores: Scores) -> dict[str, Any]:
    rows = []
    for place, query in enumerate(scores.queries):
        helpful, harmful = scores.top(place, own.top)
        solution = scores.solutions[place]
        rows.append(
            {
                "query": query,
                "loss": scores.losses[place],
                "reason": solution.reason.name,
                "iterations": solution.iterations,
                "true_residual_norm": solution.true_residual_norm,
                "helpful": [{"sample": i, "score": score} for i, score in helpful],
                "harmful": [{"sample": i, "score": score} for i, score in harmful],
            }
        )
    return plain(
        {
            "problem": point.config.problem,
            "options": point.config.options,
            "step": point.step,
            "at": own.at,
            "curvature": own.curvature,
            "damping": own.damping,
            "only": own.parameters,
            "world_size": ranks,
            "samples": point.train.samples,
            "queries_from": "validation" if held_out else "train",
            "queries": rows,
        }
    )


def _write(own: InfluenceFlags, result: dict[str, Any], scores: Scores) -> str:
    """Write the file that was asked for, in one step; its path."""
    if own.output is None:
        return ""
    path = Path(own.output)
    content: str | bytes = json.dumps(result, indent=2) + "\n"
    if path.suffix == ".csv":
        content = _table(result)
    elif path.suffix == ".npy":
        import numpy as np

        buffer = io.BytesIO()
        np.save(buffer, scores.scores)
        content = buffer.getvalue()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise UsageError(f"--output {path} cannot be written: {error.strerror or error}") from None
    return str(path)


def _table(result: dict[str, Any]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(("query", "kind", "rank", "sample", "score"))
    for row in result["queries"]:
        for kind in ("helpful", "harmful"):
            for rank, found in enumerate(row[kind], 1):
                table.writerow((row["query"], kind, rank, found["sample"], repr(found["score"])))
    return text.getvalue()
