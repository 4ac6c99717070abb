"""Memory that runs out on one rank: all ranks make room together, the product is the same, and the solve goes on."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dhf
from dhf.comm import Communicator
from dhf.curvature import Retention
from tests.distributed.test_operator import SAMPLES, SHARDS, my_batches
from tests.faults.faulty import hooked
from tests.models import mlp, problem, relative_error, split
from tests.ranks import Raised, ranks, try_ranks

CURVATURES = {"hessian": dhf.Hessian, "gauss_newton": dhf.GaussNewton, "fisher": dhf.Fisher}


class Tight(dhf.Objective):
    """Mean squares, with memory that runs out.

    Args:
        builds: At these forward passes with a graph, counted from 0.
        products: At the first so many products.
    """

    def __init__(self, *, builds: tuple[int, ...] = (), products: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(mlp().double(), nn.MSELoss(), weight_decay=0.1)
        self.builds, self.products, self.built = builds, products, 0

    def outputs(self, batch: Any) -> Tensor:
        z = super().outputs(batch)
        if not torch.is_grad_enabled():
            return z
        self.built += 1
        if self.built - 1 in self.builds:
            raise torch.OutOfMemoryError("simulated: no 12 GiB left")
        return hooked(z, self.on_product)

    def on_product(self, u: Tensor) -> Tensor:
        if self.products:
            self.products -= 1
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return u


def batches(comm: Communicator, micro_batches: int = 4) -> list[Any]:
    _, batch = problem("mlp", "mse", 24)
    size = 24 // comm.size
    return split(split(batch, [size] * comm.size)[comm.rank], [size // micro_batches] * micro_batches)


def multiply(
    comm: Communicator, curvature: str, faulty: int, options: dict[str, Any], **trouble: Any
) -> dict[str, Any]:
    """Two products, where memory runs out on one rank."""
    objective = Tight(**trouble) if comm.rank == faulty else Tight()
    retention = Retention(options.pop("retain", "auto"))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with CURVATURES[curvature](objective, batches(comm), comm=comm, retain=retention, **options) as A:
            v = torch.randn(A.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
            v = A.space.piece(v)
            first, counted = A.space.whole(A @ v), A.retained
            second = A.space.whole(A @ v)
        with CURVATURES[curvature](objective, batches(comm), comm=comm, retain=retention, **options) as A:
            later = A.retained
    return {
        "first": first,
        "second": second,
        "gradient": A.space.whole(A.gradient),
        "products": A.products,
        "retained": counted,
        "later": later,
        "told": [str(w.message) for w in told if "memory" in str(w.message)],
    }


@pytest.mark.parametrize("options", [{}, {"vectors": "sharded"}, {"bucket_bytes": 64}], ids=str)
@pytest.mark.parametrize("curvature", list(CURVATURES))
@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_ranks_make_room_for_one(size: int, curvature: str, options: dict[str, Any]) -> None:
    truth = ranks(size, multiply, curvature=curvature, faulty=-1, options={"retain": "all"})[0]
    for rank, found in enumerate(
        ranks(size, multiply, curvature=curvature, faulty=size - 1, options=options, products=1)
    ):
        assert relative_error(found["first"], truth["first"]) < 1e-12
        assert torch.equal(found["first"], found["second"])
        assert found["retained"] == 2 * size
        assert found["later"] == 2 * size
        assert len(found["told"]) == (rank == 0)
        if rank == 0:
            who = "the process" if size == 1 else f"rank {size - 1} ("
            assert found["told"][0].startswith(who)
            assert (
                f"ran out of memory in a product: the graphs of {2 * size} of {4 * size} micro-bat" in found["told"][0]
            )


@pytest.mark.parametrize("size", [1, 2, 3])
def test_graphs_are_freed_until_a_product_fits(size: int) -> None:
    truth = ranks(size, multiply, curvature="hessian", faulty=-1, options={"retain": "all"})[0]
    for rank, found in enumerate(ranks(size, multiply, curvature="hessian", faulty=0, options={}, products=3)):
        assert torch.equal(found["first"], truth["first"])
        assert found["retained"] == 0
        assert len(found["told"]) == (3 if rank == 0 else 0)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_memory_that_is_wanting_with_no_graph_left_is_an_error(size: int) -> None:
    for found in try_ranks(size, multiply, curvature="hessian", faulty=size - 1, options={}, products=99):
        assert isinstance(found, Raised)
        assert found.type == ("RankError" if size > 1 else "RuntimeError")
        assert "can't allocate memory" in found.text
        if size > 1:
            assert found.rank == size - 1
            assert "failed in its micro-batch 0" in found.text
            assert "out of memory: use smaller micro-batches" in found.text


@pytest.mark.parametrize("size", [1, 2, 3])
def test_memory_that_runs_out_while_graphs_are_built(size: int) -> None:
    truth = ranks(size, multiply, curvature="gauss_newton", faulty=-1, options={"retain": "all"})[0]
    outcomes = ranks(size, multiply, curvature="gauss_newton", faulty=size - 1, options={}, builds=(2,))
    for rank, found in enumerate(outcomes):
        assert relative_error(found["first"], truth["first"]) < 1e-12
        assert torch.equal(found["gradient"], truth["gradient"])
        assert found["retained"] == found["later"] == 4 * (size - 1) + 1
        assert len(found["told"]) == (rank == 0)
        if rank == 0:
            assert found["told"][0].startswith(f"rank {size - 1} ran out of memory while graphs were built")


def test_a_first_graph_that_finds_no_memory_is_an_error() -> None:
    for found in try_ranks(2, multiply, curvature="hessian", faulty=1, options={}, builds=(0,)):
        assert isinstance(found, Raised)
        assert (found.type, found.rank) == ("RankError", 1)


def solve(comm: Communicator, faulty: int, products: int, solver: str, retain: str, **options: Any) -> Any:
    """Three steps, where memory runs out in the first."""
    objective = Tight(products=products) if comm.rank == faulty else Tight()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = dhf.HessianFree(objective, comm=comm, solver=solver, retain=retain, seed=2, **options)
        reports = [optimizer.step(batches(comm)) for _ in range(3)]
    assert all(report.solve is not None for report in reports)
    return [(r.loss_after, r.solve.iterations) for r in reports if r.solve], optimizer.notes


@pytest.mark.parametrize("solver", ["cg", "cgls", "minres"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_solve_goes_on_when_memory_has_run_out(size: int, solver: str) -> None:
    options = {"solver": solver, "preconditioner": "none"}
    truth, _ = ranks(size, solve, faulty=-1, products=0, retain="all", **options)[0]
    for found, notes in ranks(size, solve, faulty=size - 1, products=1, retain="auto", **options):
        assert [n for _, n in found] == [n for _, n in truth]
        assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in truth], rel=1e-10)
        told = [note for note in notes if "are kept during a solve" in note]
        assert told == [
            f"graphs of {2 * size} of {4 * size} micro-batches are kept during a solve, the others rebuilt for each product"
        ]


def everything(comm: Communicator, curvature: str, shards: list[int], retain: Any) -> tuple[Tensor, int, int]:
    objective, batch = problem("mlp", "bce", SAMPLES, weight_decay=0.1)
    with CURVATURES[curvature](objective, my_batches(comm, batch, shards, 3), comm=comm, retain=retain) as A:
        before = comm.collectives
        product = A @ torch.randn(A.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        return product, comm.collectives - before, A.retained


@pytest.mark.parametrize("retain", ["none", 6000])
@pytest.mark.parametrize("shards", list(SHARDS))
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("curvature", list(CURVATURES))
def test_ranks_that_rebuild_give_what_one_that_keeps_gives(curvature: str, size: int, shards: str, retain: Any) -> None:
    truth, _, _ = everything(dhf.connect("serial"), curvature, [SAMPLES], "all")
    for product, collectives, _ in ranks(
        size, everything, curvature=curvature, shards=SHARDS[shards][size], retain=retain
    ):
        assert relative_error(product, truth) < 1e-12
        assert collectives == 1
