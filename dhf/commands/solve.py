"""python -m dhf solve: one linear system with a problem's curvature matrix. Imports no torch before there is work."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dhf.commands.parsing import DATA, RANKS, Asked, begin, read
from dhf.errors import UsageError
from dhf.reason import Reason
from dhf.run.directory import plain, write_atomically
from dhf.run.entry import complain, on_ranks_together
from dhf.run.flags import Group
from dhf.run.outcome import EXIT_TARGET, EXIT_USAGE, exit_code

if TYPE_CHECKING:
    from dhf.comm import Communicator
    from dhf.coordinator import Coordinator
    from dhf.run.monitor import Monitor
    from dhf.run.point import Point
    from dhf.run.solving import Solved
    from dhf.solvers.solution import Iteration

__all__ = ["Solve", "main"]

_DESCRIPTION = """\
Solve (A + damping I) x = b, where A is the Hessian, Gauss-Newton or Fisher matrix of a problem's loss over all ranks' data, and
b its gradient or a vector of yours. -x is then the Newton, Gauss-Newton or natural-gradient step.

  python -m dhf solve --problem digits-classifier --damping 1e-2
  python -m dhf solve --problem my_problem.py:build --options.width 128 --curvature hessian --solver minres --output x.pt
  python -m dhf solve --at runs/first --rhs b.npy --preconditioner nystrom --output x.npy --history
  torchrun --nproc_per_node=4 -m dhf solve --at runs/first --solver cgls --dtype float64
"""

_EPILOG = """\
--output FILE holds x, one number per parameter in the order of module.named_parameters(); FILE with the suffix .json how the
solve went, and names and shapes of the parameters.

exit codes: 0 done, 2 usage, 3 a product was not finite, 4 not converged (with --error-if-not-converged), 5 communication or rank
failure, 75 stopped by a signal. torchrun turns all but 0 into 1.
"""

_system = Group("system")
_output = Group("output")


@dataclasses.dataclass(frozen=True)
class Solve:
    """The flags of solve alone."""

    at: str | None = _system(
        None, "a run's directory, or a checkpoint: solve at its parameters, and with its problem unless one is given"
    )
    curvature: Literal["ggn", "hessian", "fisher"] = _system("ggn", "the matrix A")
    damping: float = _system(1e-3, "added to its diagonal")
    parameters: str | None = _system(None, "take the matrix in these alone: names or patterns, layers.0,*.bias")
    rhs: str = _system("gradient", "b: gradient, or a .pt or .npy file with one number per parameter")
    solver: Literal["cg", "minres", "cgls", "direct"] = _system(
        "cg",
        "minres where A is indefinite; cgls (residuals) and direct (dense) work on the Gauss-Newton matrix",
    )
    preconditioner: Literal["none", "jacobi", "empirical-fisher", "kfac", "nystrom"] = _system(
        "none", "of the iterative solvers"
    )
    preconditioner_rank: int | None = _system(None, "directions that nystrom samples")
    cg_rtol: float = _system(1e-5, "relative residual at which the solve stops")
    cg_max_iterations: int | None = _system(None, "most iterations; ten times the parameters by default")
    products: Literal["retained", "traced", "compiled", "auto"] = _system("auto", "how products are taken")

    history: bool = _output(False, "print each iteration, and write them into the JSON file")
    output: str | None = _output(None, "a .pt or .npy file for x")
    json: bool = _output(False, "print JSON in place of the report")
    error_if_not_converged: bool = _output(False, "exit with 4 unless the solve has converged")


def main(argv: Sequence[str] | None = None) -> int:
    """Solve as the flags say; the exit code."""
    try:
        passed = (
            "curvature",
            "solver",
            "preconditioner",
            "preconditioner_rank",
            "cg_rtol",
            "cg_max_iterations",
            "products",
        )
        asked = read(
            argv,
            "solve",
            Solve,
            (*DATA, *RANKS, "debug_nonfinite"),
            passed=passed,
            description=_DESCRIPTION,
            epilog=_EPILOG,
        )
        _check(asked.own)
    except UsageError as error:
        return complain(error, EXIT_USAGE)

    return on_ranks_together(asked.config, lambda coordinator: _solve(asked, coordinator))


def _check(own: Solve) -> None:
    if not 0 <= own.damping < math.inf:
        raise UsageError(f"--damping must be finite and not negative, got {own.damping}")
    if own.output is not None and Path(own.output).suffix not in (".pt", ".npy"):
        raise UsageError(f"--output {own.output} must end in .pt or .npy")


def _solve(asked: Asked[Solve], coordinator: Coordinator) -> int:
    from dhf.run.solving import System, solve_at

    own, comm = asked.own, coordinator.comm
    monitor, point = begin(asked, coordinator)
    system = System(own.curvature, own.damping, own.solver, own.rhs, own.cg_rtol, own.cg_max_iterations, own.parameters)
    _say_system(monitor, point, own, comm)
    note = _history(monitor) if own.history and monitor.visible else None
    solved = solve_at(point, system, coordinator, note)
    reason = coordinator.stopping or solved.solution.reason
    result = _result(point, own, comm, solved)
    written = coordinator.attempt(lambda: _write(own, result, solved) if comm.rank == 0 else [])
    _say_solution(monitor, solved, written)
    if own.json and comm.rank == 0:
        print(json.dumps(result, indent=2), flush=True)
    if reason is Reason.NON_FINITE:
        reason = Reason.DIVERGED
    code = exit_code(reason)
    return EXIT_TARGET if code == 0 and own.error_if_not_converged and not solved.solution.converged else code


def _say_system(monitor: Monitor, point: Point, own: Solve, comm: Communicator) -> None:
    from dhf.run.point import sizes_in_words

    rhs = "the gradient" if own.rhs == "gradient" else own.rhs
    monitor.say(f"problem   {point.config.problem} at {point.where}, {comm.size} rank(s) over {comm.backend}")
    monitor.say(f"system    ({own.curvature} + {own.damping:g} I) x = {rhs}; {sizes_in_words(point)}")


def _history(monitor: Monitor) -> Any:
    def note(iteration: Iteration, norm: float) -> None:
        if iteration.number == 0:
            monitor.say(f"{'iteration':>9} {'residual':>10} {'model':>13} {'curvature':>10}")
        curvature = "-" if math.isnan(iteration.curvature) else f"{iteration.curvature:.2e}"
        relative = iteration.residual_norm / (norm or 1.0)
        monitor.say(f"{iteration.number:>9} {relative:>10.2e} {iteration.model:>13.6g} {curvature:>10}")

    return note


def _say_solution(monitor: Monitor, solved: Solved, written: Sequence[str]) -> None:
    found = solved.as_dict()
    per_second = f", {found['products'] / found['seconds']:.0f} a second" if found["products"] else ""
    preconditioner = "" if solved.preconditioner == "none" else f", preconditioner {solved.preconditioner}"
    for line in (
        f"loss      {found['loss']:.6g}, gradient norm {found['gradient_norm']:.4g}, norm of b {found['rhs_norm']:.4g}",
        f"residual  {found['relative_residual']:.2e} of b's norm; by a product at the end {found['relative_true_residual']:.2e}",
        f"solution  norm {found['solution_norm']:.4g}, model {found['model']:.6g}",
        f"cost      {found['iterations']} iterations, {found['products']} products in {found['seconds']:.2f} s"
        f"{per_second}{preconditioner}",
        f"reason    {solved.solution.reason.words}: {found['advice']}",
        *([f"written   {', '.join(written)}"] if written else []),
    ):
        monitor.say(line)


def _result(point: Point, own: Solve, comm: Communicator, solved: Solved) -> dict[str, Any]:
    """What is written as JSON: plain values, null where a number is not finite."""
    history = [plain(dataclasses.asdict(iteration)) for iteration in solved.solution.history] if own.history else None
    return plain(
        {
            "problem": point.config.problem,
            "options": point.config.options,
            "step": point.step,
            "at": own.at,
            "curvature": own.curvature,
            "damping": own.damping,
            "solver": own.solver,
            "rhs": own.rhs,
            "only": own.parameters,
            "rtol": own.cg_rtol,
            "dtype": str(solved.solution.x.dtype).removeprefix("torch."),
            "world_size": comm.size,
            "samples": point.train.batch_size,
            **solved.as_dict(),
            "parameters": [{"name": name, "shape": list(shape)} for name, shape in solved.parameters],
            **({} if history is None else {"history": history}),
        }
    )


def _write(own: Solve, result: dict[str, Any], solved: Solved) -> list[str]:
    """Write x and what is known of it, each file in one step; their paths."""
    if own.output is None:
        return []
    from dhf.run.solving import tensor_bytes

    path = Path(own.output)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, tensor_bytes(path, solved.solution.x))
        write_atomically(path.with_suffix(".json"), json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise UsageError(f"--output {path} cannot be written: {error}") from None
    return [str(path), str(path.with_suffix(".json"))]
