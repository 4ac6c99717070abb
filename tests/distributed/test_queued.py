"""Queued conjugate gradients over several ranks, on the CPU: as one process, every stop agreed, every failure shared.

Ranks begin with the next product ahead of the verdict or do not, each as it likes; here every other does.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dhf
from dhf.comm import Communicator
from dhf.coordinator import Coordinator
from dhf.operator import GlobalOperator
from dhf.operator.whole import Whole
from dhf.solvers import queued
from tests.distributed.test_agreement import SEEDS, Disturbed
from tests.distributed.test_operator import SAMPLES, SHARDS, my_batches, nan_in_products
from tests.distributed.test_retention import Tight, batches
from tests.models import problem, relative_error
from tests.ranks import Raised, ranks, try_ranks
from tests.recorded import record_on_cpu


@contextlib.contextmanager
def queueing(comm: Communicator, recorded: bool = False) -> Iterator[None]:
    """Have cg queue its products."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GlobalOperator, "queues", property(lambda A: isinstance(A._reduction, Whole)))
        patch.setattr(queued, "_BRIEF", math.inf if comm.rank % 2 == 0 else 0.0)
        if recorded:
            record_on_cpu(patch)
        yield


def solve(comm: Communicator, shards: list[int], recorded: bool) -> tuple[dhf.Solution, int]:
    """A solution, and the collectives that it took."""
    objective, batch = problem("mlp", "cross_entropy", SAMPLES, weight_decay=0.01)
    mine = my_batches(comm, batch, shards, 2)
    with queueing(comm, recorded), dhf.GaussNewton(objective, mine, comm=comm) as A:
        M = dhf.Nystrom(rank=4)(A, 0.1)
        before = comm.collectives
        solution = dhf.cg(A.shifted(0.1), -A.gradient, rtol=1e-7, preconditioner=M, snapshot_ratio=1.3)
        return solution, comm.collectives - before


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("shards", list(SHARDS))
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_solve_as_one_process(size: int, shards: str, recorded: bool) -> None:
    objective, batch = problem("mlp", "cross_entropy", SAMPLES, weight_decay=0.01)
    with dhf.GaussNewton(objective, [batch]) as A:
        M = dhf.Nystrom(rank=4)(A, 0.1)
        truth = dhf.cg(A.shifted(0.1), -A.gradient, rtol=1e-7, preconditioner=M)
    first, *others = ranks(size, solve, shards=SHARDS[shards][size], recorded=recorded)
    solution, collectives = first
    assert (solution.reason, solution.iterations) == (truth.reason, truth.iterations)
    assert relative_error(solution.x, truth.x) < 1e-7
    assert collectives == solution.iterations + 1
    for other, taken in others:
        assert torch.equal(other.x, solution.x)
        assert taken == collectives


def disturbed(comm: Communicator) -> list[tuple[int, dhf.Reason, int, Tensor]]:
    """Solves whose first inner products differ in the last place from rank to rank."""
    objective, batch = problem("mlp", "mse")
    found = []
    with queueing(comm), dhf.GaussNewton(objective, [batch], comm=comm) as A:
        for seed in range(SEEDS):
            A.space = Disturbed(1000 * seed + comm.rank, 4)
            residuals = dhf.cg(A.shifted(1e-2), A.gradient, rtol=1e-9).history
            at = comm.gather_objects(residuals[3 + seed % 4].residual_norm)[seed % comm.size]
            before = comm.collectives
            solution = dhf.cg(A.shifted(1e-2), A.gradient, rtol=0.0, atol=at)
            mixed = comm.collectives - before - solution.iterations - 1
            found.append((solution.iterations, solution.reason, mixed, solution.x))
    return found


def test_all_ranks_stop_together() -> None:
    first, *others = ranks(4, disturbed)
    assert any(mixed for _, _, mixed, _ in first), "no case was close enough for the ranks to disagree"
    for other in others:
        for (*mine, x), (*theirs, y) in zip(first, other, strict=True):
            assert mine == theirs
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def in_trouble(comm: Communicator, place: str, who: int) -> dhf.Solution:
    """A solve in whose third iteration something happens on one rank."""
    objective, batch = problem("mlp", "mse")
    told = [False]
    coordinator = Coordinator(comm, interrupted=lambda: told[0])
    calls = [0]

    def now() -> bool:
        calls[0] += 1
        return comm.rank == who and calls[0] == 4

    def precondition(r: Tensor) -> Tensor:
        if place == "preconditioner" and now():
            raise KeyError("mine")
        return r

    def callback(_: Any) -> None:
        if place == "callback" and now():
            raise KeyError("mine")
        told[0] |= place == "signal" and now()

    options: dict[str, Any] = {"preconditioner": precondition, "callback": callback}
    with queueing(comm), dhf.GaussNewton(objective, [batch], coordinator=coordinator) as A:
        return dhf.cg(A.shifted(1e-3), A.gradient, rtol=1e-12, **options)


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("place", ["preconditioner", "callback"])
def test_what_fails_on_one_rank_is_raised_on_all(place: str, who: int) -> None:
    for outcome in try_ranks(2, in_trouble, place=place, who=who):
        assert isinstance(outcome, Raised)
        assert (outcome.type, outcome.rank) == ("RankError", who)
        assert "KeyError: 'mine'" in outcome.text


@pytest.mark.parametrize("who", [0, 1])
def test_a_signal_on_one_rank_stops_all(who: int) -> None:
    first, second = ranks(2, in_trouble, place="signal", who=who)
    assert first.reason is second.reason is dhf.Reason.INTERRUPTED
    assert first.iterations == second.iterations == 3
    assert torch.equal(first.x, second.x)


def poisoned(comm: Communicator, bad: list[int]) -> dhf.Solution:
    with queueing(comm):
        return nan_in_products(comm, bad)[1]


def test_nan_from_one_rank_ends_the_solve_on_all() -> None:
    for solution in ranks(2, poisoned, bad=[1]):
        assert solution.reason is dhf.Reason.NON_FINITE
        assert solution.iterations == 0
        assert not solution.x.any()


def in_little_memory(comm: Communicator, products: int) -> tuple[dhf.Solution, int]:
    objective = Tight(products=products) if comm.rank == comm.size - 1 else Tight()
    with warnings.catch_warnings(), queueing(comm):
        warnings.simplefilter("ignore")
        with dhf.GaussNewton(objective, batches(comm), comm=comm) as A:
            return dhf.cg(A.shifted(0.1), A.gradient, rtol=1e-8), A.retained


@pytest.mark.parametrize("size", [1, 2])
def test_all_ranks_make_room_for_one(size: int) -> None:
    expected, _ = ranks(size, in_little_memory, products=0)[0]
    for found, retained in ranks(size, in_little_memory, products=1):
        assert retained == 2 * size
        assert (found.reason, found.iterations) == (expected.reason, expected.iterations)
        torch.testing.assert_close(found.x, expected.x, rtol=1e-9, atol=1e-12)
