"""What a CG iteration costs on a GPU, by how products and iterations are handed to it, and by what else offers such a solve.

    python benchmarks/solves.py [--device cuda] [--rounds 7]

Every solve is 50 iterations on the damped Gauss-Newton matrix of one batch, taken in turn in one process, by the clock and until
the device has finished; medians over rounds. Building the graphs is not in it, recording products and iterations is.

    replayed            dhf: products and iterations are recorded, verdicts read while the next product runs
    replayed products   dhf, but for the iterations, of which the host takes every number
    launched            dhf with nothing recorded
    curvlinops          its CGInverseLinearOperator
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from measure import interleave, parser, ratio, save
from networks import Case, autoencoder, cases
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import dhf
from dhf.operator import GlobalOperator
from dhf.replay import Replay

ITERATIONS, DAMPING = 50, 0.1
SUBJECTS = {
    "digits autoencoder": lambda: autoencoder((64, 100, 50, 25, 6, 25, 50, 100, 64), 1797),
    **cases(),
}


@contextlib.contextmanager
def handed(how: str) -> Iterator[None]:
    """Have dhf hand its work to a GPU in one of the ways above."""
    with contextlib.ExitStack() as stack:
        if how != "replayed":
            stack.enter_context(mock.patch.object(GlobalOperator, "queues", False))
        if how == "launched":
            stack.enter_context(mock.patch.object(Replay, "_record", return_value=None))
        yield


def own_solve(A: GlobalOperator, how: str, preconditioner: Any) -> Callable[[], Tensor]:
    """dhf's solve on an open operator."""

    def solve() -> Tensor:
        A._replays.forget()  # recording is a part of every solve, as it is in training
        with handed(how):
            return dhf.cg(
                A.shifted(DAMPING),
                -A.gradient,
                rtol=0.0,
                max_iterations=ITERATIONS,
                true_residual=False,
                preconditioner=preconditioner,
            ).x

    return solve


def curvlinops_solve(case: Case, b: Tensor) -> Callable[[], Tensor]:
    """The same system by curvlinops."""
    import curvlinops
    from curvlinops.examples import IdentityLinearOperator

    parameters = list(case.module.parameters())
    data = [(case.inputs, case.targets)]
    ggn = curvlinops.GGNLinearOperator(case.module, case.loss, parameters, data, check_deterministic=False)
    identity = IdentityLinearOperator([p.shape for p in parameters], b.device, b.dtype)
    inverse = curvlinops.CGInverseLinearOperator(
        ggn + DAMPING * identity, max_iter=ITERATIONS, max_tridiag_iter=1, tolerance=0.0, stop_updating_after=0.0
    )
    return lambda: inverse @ b


def measure(case: Case, rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds of every way, for one network."""
    objective, failed = dhf.Objective(case.module, case.loss), {}
    with dhf.GaussNewton(objective, [(case.inputs, case.targets)]) as A:
        kfac = dhf.KFAC()(A, DAMPING)
        ways = ("replayed", "replayed products", "launched")
        solves = {how: own_solve(A, how, None) for how in ways} | {
            f"{how}, K-FAC": own_solve(A, how, kfac) for how in ways
        }
        reference = solves["launched"]()
        try:
            solves["curvlinops"] = curvlinops_solve(case, -A.gradient)
            solves["curvlinops"]()
        except Exception as error:  # whatever another package raises on a network it was not written for
            solves.pop("curvlinops", None)
            failed["curvlinops"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        apart = {}
        for how, solve in solves.items():
            apart[how] = float((solve() - reference).norm() / reference.norm())
        seconds = interleave(solves, rounds=rounds, device=device)
    return {"seconds": seconds, "relative difference": apart, "failed": failed}


def main() -> None:
    """Run all subjects, print a table, write the JSON."""
    arguments = parser(__doc__ or "").parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.allow_tf32 = False
    found: dict[str, Any] = {}
    with sdpa_kernel(SDPBackend.MATH):
        for name, make in SUBJECTS.items():
            for dtype in (torch.float32, torch.float64):
                torch.manual_seed(0)
                entry = measure(make().to(dtype, device), arguments.rounds, device)
                found.setdefault(name, {})[str(dtype).removeprefix("torch.")] = entry
                each = {how: f"{1e6 * statistics.median(s) / ITERATIONS:.0f} us" for how, s in entry["seconds"].items()}
                gain = ratio(entry["seconds"], "launched", "replayed")
                print(f"{name}, {dtype}: {each}; launched / replayed {gain:.2f}; {entry['failed']}", flush=True)
    print(f"written {save('solves', arguments, {'iterations': ITERATIONS, 'damping': DAMPING, 'subjects': found})}")


if __name__ == "__main__":
    main()
