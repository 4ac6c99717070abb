"""python -m dhf spectrum: eigenvalues, trace and density of a problem's curvature matrix. Imports no torch at first."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dhf.commands.arguments import require_matplotlib
from dhf.commands.parsing import DATA, RANKS, Asked, begin, read
from dhf.errors import UsageError
from dhf.run.directory import plain, write_atomically
from dhf.run.entry import complain, on_ranks_together
from dhf.run.flags import Group
from dhf.run.outcome import EXIT_DONE, EXIT_TARGET, EXIT_USAGE, exit_code

if TYPE_CHECKING:
    from dhf.coordinator import Coordinator
    from dhf.run.eigenvalues import Spectrum
    from dhf.run.monitor import Monitor
    from dhf.run.point import Point

__all__ = ["SpectrumFlags", "main"]

_DESCRIPTION = """\
Find the largest and smallest eigenvalues of the Hessian, Gauss-Newton or Fisher matrix of a problem's loss, with error bounds,
its trace, and how many eigenvalues lie where; the matrix is never formed.

  python -m dhf spectrum --problem digits-classifier --largest 10
  python -m dhf spectrum --at runs/first --smallest 3 --output spectrum.json --picture spectrum.png
  python -m dhf spectrum --problem my_problem.py:build --parameters head --curvature ggn --trace-products 0
  torchrun --nproc_per_node=4 -m dhf spectrum --at runs/first --dtype float64
"""

_EPILOG = """\
An eigenvalue of the matrix lies within the error bound of each value. Trace and density are estimates by random vectors, which
--seed names; they are given with their standard error.

exit codes: 0 done, 2 usage, 4 an eigenvalue missed the tolerance (with --error-if-not-converged), 5 communication or rank
failure, 75 stopped by a signal. torchrun turns all but 0 into 1.
"""

_matrix = Group("matrix")
_wanted = Group("what is looked at")
_output = Group("output")


@dataclasses.dataclass(frozen=True)
class SpectrumFlags:
    """The flags of spectrum alone."""

    at: str | None = _matrix(
        None, "a run's directory, or a checkpoint: look at its parameters, and its problem unless one is given"
    )
    curvature: Literal["hessian", "ggn", "fisher"] = _matrix("hessian", "the matrix")
    parameters: str | None = _matrix(None, "take the matrix in these alone: names or patterns, such as layers.0,*.bias")
    products: Literal["retained", "traced", "compiled", "auto"] = _matrix("auto", "how products are taken")

    largest: int = _wanted(5, "eigenvalues at the upper end")
    smallest: int = _wanted(0, "eigenvalues at the lower end, the most negative first")
    tol: float | None = _wanted(None, "of each, relative to the norm; 1e-8 in float64 and 1e-5 in float32 by default")
    max_products: int | None = _wanted(None, "most products for either end")
    trace_products: int = _wanted(60, "products for the trace; 0 leaves it out")
    density_samples: int = _wanted(4, "random vectors for the density; 0 leaves it out")
    density_steps: int = _wanted(60, "products for each of them")

    output: str | None = _output(None, "a .json file for all that was found")
    picture: str | None = _output(None, "a .png or .svg file for eigenvalues and density; needs matplotlib")
    json: bool = _output(False, "print JSON in place of the report")
    error_if_not_converged: bool = _output(False, "exit with 4 unless all eigenvalues have converged")


def main(argv: Sequence[str] | None = None) -> int:
    """Look as the flags say; the exit code."""
    try:
        asked = read(
            argv,
            "spectrum",
            SpectrumFlags,
            (*DATA, *RANKS, "debug_nonfinite"),
            passed=("curvature", "products"),
            description=_DESCRIPTION,
            epilog=_EPILOG,
        )
        _check(asked.own)
    except UsageError as error:
        return complain(error, EXIT_USAGE)
    return on_ranks_together(asked.config, lambda coordinator: _look(asked, coordinator))


def _check(own: SpectrumFlags) -> None:
    for name in ("largest", "smallest", "trace_products", "density_samples"):
        if getattr(own, name) < 0:
            raise UsageError(f"--{name.replace('_', '-')} must not be negative, got {getattr(own, name)}")
    for name in ("max_products", "density_steps"):
        if getattr(own, name) is not None and getattr(own, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(own, name)}")
    if own.tol is not None and not 0 < own.tol < 1:
        raise UsageError(f"--tol must be in (0, 1), got {own.tol}")
    if own.output is not None and Path(own.output).suffix != ".json":
        raise UsageError(f"--output {own.output} must end in .json")
    if own.picture is not None:
        if Path(own.picture).suffix not in (".png", ".svg"):
            raise UsageError(f"--picture {own.picture} must end in .png or .svg")
        if not (own.largest or own.smallest or own.density_samples):
            raise UsageError("--picture has nothing to draw; give --largest, --smallest or --density-samples")
        require_matplotlib()


def _look(asked: Asked[SpectrumFlags], coordinator: Coordinator) -> int:
    from dhf.run.eigenvalues import Wanted, look_at_spectrum
    from dhf.run.point import sizes_in_words

    own, comm = asked.own, coordinator.comm
    leads = comm.rank == 0
    monitor, point = begin(asked, coordinator)
    monitor.say(f"problem   {point.config.problem} at {point.where}, {comm.size} rank(s) over {comm.backend}")
    monitor.say(f"matrix    {own.curvature}; {sizes_in_words(point)}")
    spectrum = look_at_spectrum(
        point, Wanted(**{f.name: getattr(own, f.name) for f in dataclasses.fields(Wanted)}), coordinator
    )
    result = _result(point, own, comm.size, spectrum)
    written = coordinator.attempt(lambda: _write(own, result) if leads else [])
    _report(monitor, spectrum, written)
    if own.json and leads:
        print(json.dumps(result, indent=2), flush=True)
    if coordinator.stopping is not None:
        return exit_code(coordinator.stopping)
    return EXIT_TARGET if own.error_if_not_converged and not spectrum.converged else EXIT_DONE


def _report(monitor: Monitor, spectrum: Spectrum, written: Sequence[str]) -> None:
    monitor.say(f"loss      {spectrum.loss:.6g}, gradient norm {spectrum.gradient_norm:.4g}")
    for name, found in spectrum.ends.items():
        monitor.say(f"{name:<10}{found.reason.words}, {found.products} products")
        for value, bound in zip(found.values.tolist(), _bounds(found), strict=True):
            monitor.say(f"{value:>20.8g}  within {bound:.1e}")
    if spectrum.trace is not None:
        error = spectrum.trace.standard_error
        monitor.say(
            f"trace     {spectrum.trace.value:.6g}, standard error {error:.2g}, {spectrum.trace.products} products"
        )
    if spectrum.density is not None:
        monitor.say(f"density   about so many of {spectrum.n:,} eigenvalues, {spectrum.density.products} products")
        for line in spectrum.bars():
            monitor.say(line)
    monitor.say(f"cost      {spectrum.products} products in {spectrum.seconds:.2f} s")
    if written:
        monitor.say(f"written   {', '.join(written)}")


def _bounds(found: Any) -> list[float]:
    """The bounds by products with the vectors; those of the recursion where these were not taken."""
    pairs = zip(found.residual_norms.tolist(), found.error_bounds.tolist(), strict=True)
    return [true if true == true else bound for true, bound in pairs]


def _result(point: Point, own: SpectrumFlags, ranks: int, spectrum: Spectrum) -> dict[str, Any]:
    return plain(
        {
            "problem": point.config.problem,
            "options": point.config.options,
            "step": point.step,
            "at": own.at,
            "curvature": own.curvature,
            "only": own.parameters,
            "world_size": ranks,
            "samples": point.train.batch_size,
            **spectrum.as_dict(),
        }
    )


def _write(own: SpectrumFlags, result: dict[str, Any]) -> list[str]:
    """Write what was asked for, each file in one step; their paths."""
    written = []
    try:
        if own.output is not None:
            path = Path(own.output)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(result, indent=2) + "\n")
            written.append(str(path))
        if own.picture is not None and (result["eigenvalues"] or "density" in result):  # as far as a signal let it come
            from dhf.run.spectrum import draw_spectrum
            from dhf.run.theme import LIGHT

            path = Path(own.picture)
            path.parent.mkdir(parents=True, exist_ok=True)
            with LIGHT.applied(path.suffix[1:]):
                draw_spectrum(result, LIGHT).savefig(path)
            written.append(str(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}; give another file") from None
    return written
