"""What every rank of benchmarks/scaling.py runs: solves and steps on an autoencoder, in several setups that take turns.

Times are told by phase, each second counted once:

    graphs          building the gradient graph of the shard
    product         this rank's share of curvature products
    waiting         collectives: waiting for slower ranks, and for the network
    preconditioner  renewing and applying it
    line search     trial values of the objective
    vectors         what is left: the vector work of the solver, and dispatch

The file it writes is rank 0's, with the mean over ranks of each phase; totals are rank 0's between two barriers.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from networks import autoencoder
from torch import Tensor

import dhf
from dhf.comm import Communicator
from dhf.coordinator import Coordinator
from dhf.phases import Phases
from dhf.solvers.cg import ConjugateGradients

WIDTHS = (784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784)


# dhf's own names of phases, and those of the results
PHASES = {
    "graphs": "graphs",
    "products": "product",
    "waiting": "waiting",
    "preconditioner": "preconditioner",
    "trial": "line search",
    "vectors": "vectors",
}


def told(phases: Phases) -> dict[str, float]:
    """The seconds since the phases began."""
    profile = phases.end()
    assert profile is not None
    return {PHASES[name]: seconds for name, seconds in profile.seconds.items() if name in PHASES}


class Run:
    """One autoencoder and this rank's share of a batch."""

    def __init__(self, comm: Communicator, phases: Phases, widths: tuple[int, ...]) -> None:
        self.comm, self.phases = comm, phases
        torch.manual_seed(0)
        self.case = autoencoder(widths, 8)
        self.n = sum(p.numel() for p in self.case.module.parameters())
        self._start = torch.nn.utils.parameters_to_vector(self.case.module.parameters()).detach().clone()
        self._batches: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def batches(self, batch: int) -> list[tuple[Tensor, Tensor]]:
        """This rank's micro-batch of so many samples over all ranks."""
        if batch not in self._batches:
            images = torch.rand(batch, WIDTHS[0], generator=torch.Generator().manual_seed(1))
            mine = images[
                self.comm.rank * batch // self.comm.size : (self.comm.rank + 1) * batch // self.comm.size
            ].clone()
            self._batches[batch] = [(mine, mine)] if len(mine) else []
        return self._batches[batch]

    def solve(self, setup: dict[str, Any], callback: Callable[..., None] | None = None) -> dict[str, float]:
        """A Gauss-Newton solve of a fixed number of iterations; its phases are those of the iterations alone."""
        objective = dhf.Objective(self.case.module, self.case.loss)
        coordinator = Coordinator(self.comm, phases=self.phases)
        options = {"vectors": setup.get("vectors", "replicated"), "bucket_bytes": setup.get("bucket_bytes")}
        with dhf.GaussNewton(objective, self.batches(setup["batch"]), coordinator=coordinator, **options) as A:
            damped = A.compressed(1.0) if setup.get("reduce_dtype") == "bfloat16" else A.shifted(1.0)
            self.comm.barrier()
            self.phases.begin()
            dhf.cg(
                damped,
                -A.gradient,
                rtol=0.0,
                atol=0.0,
                max_iterations=setup["iterations"],
                true_residual=False,
                callback=callback,
            )
            return told(self.phases)

    def step(self, setup: dict[str, Any]) -> dict[str, float]:
        """A whole step of the deep-net preset from the start, with the batch's iterations and a renewal of K-FAC."""
        torch.nn.utils.vector_to_parameters(self._start.clone(), self.case.module.parameters())
        objective = dhf.Objective(self.case.module, self.case.loss)
        optimizer = dhf.HessianFree(
            objective,
            coordinator=Coordinator(self.comm, phases=self.phases),
            preset="deep-net",
            vectors=setup.get("vectors", "replicated"),
            bucket_mb=(setup.get("bucket_bytes") or 0) / 1e6,
            cg_max_iterations=setup["iterations"],
            cg_rtol=0.0,
        )
        self.comm.barrier()
        report = optimizer.step(self.batches(setup["batch"]))
        return {PHASES[name]: seconds for name, seconds in report.profile.seconds.items() if name in PHASES}

    def memory(self, setup: dict[str, Any]) -> dict[str, float]:
        """Most megabytes of flat vectors that live at once during a step, by their storages.

        The parameters themselves, which are views of one vector here, and this class's own copy are left out.
        """
        n, size = self.n, self.comm.size
        most = 0.0
        advance = ConjugateGradients.step

        def look(cg: ConjugateGradients, *args: Any) -> Any:
            nonlocal most
            result = advance(cg, *args)
            found = {}
            for thing in gc.get_objects():
                if type(thing) is Tensor and thing.dim() == 1:
                    numbers = thing.untyped_storage().nbytes() // thing.itemsize
                    if n // size <= numbers <= n + 64 or numbers == -(-n // size) * size:
                        found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
            for own in (self._start, *self.case.module.parameters()):
                found.pop(own.untyped_storage().data_ptr(), None)
            most = max(most, sum(found.values()) / 1e6)
            return result

        ConjugateGradients.step = look  # type: ignore[method-assign]
        try:
            self.step(setup)
        finally:
            ConjugateGradients.step = advance  # type: ignore[method-assign]
        return {"megabytes": most}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setups", required=True, help="JSON list of setups")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", required=True)
    parser.add_argument("--backend", default="auto")
    parser.add_argument(
        "--link", type=float, default=0.0, help="MB to all-reduce bare, to measure the link; 0 for none"
    )
    args = parser.parse_args()
    setups = json.loads(args.setups)
    comm = dhf.connect(args.backend, threads=1, timeout=120)
    phases = Phases(comm.device)
    run = Run(comm, phases, WIDTHS)
    kinds = {"solve": run.solve, "step": run.step, "memory": run.memory}
    rows: list[dict[str, Any]] = [{**setup, "ranks": comm.size, "total": [], "phases": []} for setup in setups]
    for turn in range(args.rounds + 1):
        order = list(range(len(setups)))
        for i in order[turn % len(order) :] + order[: turn % len(order)]:
            found = kinds[setups[i]["kind"]](setups[i])
            comm.barrier()
            everyone = comm.gather_objects(found)
            names = sorted({name for one in everyone for name in one})
            mean = {name: statistics.fmean(one.get(name, 0.0) for one in everyone) for name in names}
            if turn:
                rows[i]["phases"].append(mean)
                rows[i]["total"].append(sum(found.values()))
    bare = _bare(comm, run.n) if args.link else None
    if comm.rank == 0:
        document = {"n": run.n, "backend": comm.backend, "bare all-reduce": bare, "rows": rows}
        Path(args.out).write_text(json.dumps(document))
    comm.barrier()
    comm.close()


def _bare(comm: Communicator, n: int) -> list[dict[str, float]]:
    """Medians of bare all-reduces by size, for the model's latency and bandwidth."""
    found = []
    for numbers in (16, n // 8, n):
        buffer, seconds = torch.zeros(numbers), []
        for _ in range(12):
            comm.barrier()
            began = time.perf_counter()
            comm.all_reduce(buffer)
            seconds.append(time.perf_counter() - began)
        found.append({"numbers": numbers, "seconds": statistics.median(seconds[2:])})
    return found


if __name__ == "__main__":
    main()
