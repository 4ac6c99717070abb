"""Conjugate gradients with numbers that stay on the device, over several ranks: one solution, every stop agreed."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch

import dhf
from dhf.comm import Communicator
from dhf.coordinator import Coordinator
from dhf.operator import GlobalOperator
from dhf.solvers import queued
from dhf.solvers.queued import QueuedConjugateGradients
from tests.distributed.test_operator import SAMPLES, SHARDS, my_batches
from tests.models import problem, relative_error
from tests.ranks import Raised, ranks, try_ranks


class _Apart(QueuedConjugateGradients):
    """One whose residual norms come out a little larger or smaller."""

    factor = 1.0

    def advance(self, product: torch.Tensor) -> Any:
        self._told[4] *= self.factor
        return super().advance(product)


def solve(
    comm: Communicator, shards: list[int], queues: bool = True, apart: float = 0.0, fault: str = "", **options: Any
) -> tuple[dhf.Solution, int]:
    """A solution and the collectives that it took; rank 1's norms are apart, or it has a fault at its third iteration."""
    objective, batch = problem("mlp", "cross_entropy", SAMPLES, weight_decay=0.1)
    mine = comm.rank == 1
    told = [False]
    coordinator = Coordinator(comm, interrupted=lambda: told[0])

    def watch(iteration: Any) -> None:
        if mine and iteration.number == 3:
            told[0] = fault == "signal"
            if fault == "callback":
                raise KeyError("rank 1's own")

    with (
        mock.patch.object(GlobalOperator, "queues", queues),
        mock.patch.object(queued, "_BRIEF", math.inf),
        mock.patch.object(queued, "QueuedConjugateGradients", _Apart),
        mock.patch.object(_Apart, "factor", 1.0 + apart * mine),
        dhf.GaussNewton(objective, my_batches(comm, batch, shards, 2), coordinator=coordinator) as A,
    ):
        if fault == "nan" and mine:
            shard = A._open_shard()
            multiply, calls = shard.product, [0]

            def product(v: torch.Tensor, out: torch.Tensor, *args: Any, **more: Any) -> None:
                multiply(v, out, *args, **more)
                calls[0] += 1
                if calls[0] == 4:
                    out[0] = math.nan

            shard.product = product  # type: ignore[method-assign]
        before = comm.collectives
        solution = dhf.cg(A.shifted(0.1), -A.gradient, callback=watch, **options)
        return solution, comm.collectives - before


@pytest.mark.parametrize("shards", list(SHARDS))
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_solve_as_one_process(size: int, shards: str) -> None:
    truth, _ = solve(dhf.connect("serial"), [SAMPLES], queues=False, rtol=1e-8)
    (solution, collectives), *others = ranks(size, solve, shards=SHARDS[shards][size], rtol=1e-8)
    assert solution.reason is truth.reason
    assert solution.iterations == truth.iterations
    assert relative_error(solution.x, truth.x) < 1e-7
    assert collectives == solution.iterations + 1  # what is begun in vain is sent to nobody
    for other, theirs in others:
        assert torch.equal(other.x, solution.x)
        assert (other.reason, theirs) == (solution.reason, collectives)


@pytest.mark.parametrize("apart", [0.5, -0.5])
def test_ranks_that_see_other_residuals_end_together(apart: float) -> None:
    seen, _ = solve(dhf.connect("serial"), [SAMPLES], queues=False, rtol=1e-10)
    # between the norms of the sixth iteration as rank 0 and rank 1 see them
    own = seen.history[6].residual_norm
    atol = own * (1.2 if apart > 0 else 0.8)
    found = ranks(2, solve, shards=[6, 6], apart=apart, rtol=0.0, atol=atol)
    (first, count), (second, other) = found
    assert first.reason is second.reason is dhf.Reason.RESIDUAL_TOLERANCE
    assert first.iterations == second.iterations == (6 if apart > 0 else 7)  # rank 0 decides
    assert torch.equal(first.x, second.x)
    assert count == other > first.iterations + 1


@pytest.mark.parametrize(("fault", "reason"), [("nan", dhf.Reason.NON_FINITE), ("signal", dhf.Reason.INTERRUPTED)])
def test_what_one_rank_sees_ends_the_solve_for_all(fault: str, reason: dhf.Reason) -> None:
    (first, count), (second, other) = ranks(2, solve, shards=[6, 6], fault=fault, rtol=1e-12)
    assert first.reason is second.reason is reason
    assert first.iterations == second.iterations
    assert torch.equal(first.x, second.x)
    assert bool(first.x.isfinite().all())
    assert count == other


def test_what_fails_on_one_rank_is_raised_on_all() -> None:
    for outcome in try_ranks(2, solve, shards=[6, 6], fault="callback", rtol=1e-12):
        assert isinstance(outcome, Raised)
        assert outcome.type == "RankError"
        assert "rank 1" in outcome.text
        assert "rank 1's own" in outcome.text
