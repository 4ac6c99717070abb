"""Preconditioners over several ranks: what one process makes, the same bits everywhere, and what they cost."""

from __future__ import annotations

import functools
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dhf
from dhf.comm import Communicator
from dhf.preconditioners import KFAC, Nystrom, empirical_fisher, jacobi
from tests.distributed.test_operator import SAMPLES, SHARDS, my_batches
from tests.models import problem, relative_error
from tests.ranks import ranks, try_ranks

# collectives of a first call and of a second
COSTS = {"kfac": [1, 0], "nystrom": [9, 0], "jacobi": [10, 10], "empirical_fisher": [1, 1]}
SHARED = {"kfac": 1, "nystrom": 1}  # more for a first call of several ranks, which divide its work


def made(name: str) -> Any:
    if name in ("jacobi", "empirical_fisher"):
        return {"jacobi": jacobi, "empirical_fisher": empirical_fisher}[name]
    return KFAC(refresh=2, seed=3) if name == "kfac" else Nystrom(rank=6, seed=3)


def objective_of(loss: str) -> tuple[dhf.Objective, Any]:
    """A model with a normalisation, which K-FAC does not cover."""
    return problem("layernorm", loss, SAMPLES, weight_decay=0.01)


def precondition(
    comm: Communicator, name: str, shards: list[int], micro_batches: int, loss: str = "cross_entropy", ignore: int = 0
) -> tuple[Tensor, list[int], dict[str, Any]]:
    """Vectors preconditioned for two dampings, the collectives of each call, and the state."""
    objective, (x, y) = objective_of(loss)
    y[:ignore] = -100
    make, zs, collectives = made(name), [], []
    with (
        warnings.catch_warnings(),
        dhf.GaussNewton(objective, my_batches(comm, (x, y), shards, micro_batches), comm=comm) as A,
    ):
        warnings.simplefilter("ignore")
        R = torch.randn(A.shape[0], 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        for damping in (0.1, 0.02):
            before = comm.collectives
            apply = make(A, damping)
            zs += [apply(r) for r in R.T]
            collectives.append(comm.collectives - before)
    return torch.stack(zs), collectives, make.state_dict() if hasattr(make, "state_dict") else {}


@functools.cache
def serial(name: str, loss: str = "cross_entropy", ignore: int = 0) -> Tensor:
    return precondition(dhf.connect("serial"), name, [SAMPLES], 1, loss, ignore)[0]


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(("size", "shards"), [(1, "even"), *itertools.product((2, 3, 4), SHARDS)])
@pytest.mark.parametrize("name", list(COSTS))
def test_ranks_make_what_one_process_makes(name: str, size: int, shards: str, micro_batches: int) -> None:
    truth = serial(name)
    first, *others = ranks(size, precondition, name=name, shards=SHARDS[shards][size], micro_batches=micro_batches)
    assert relative_error(first[0], truth) < 1e-9
    assert first[1] == [COSTS[name][0] + (SHARED.get(name, 0) if size > 1 else 0), COSTS[name][1]]
    for other in others:
        assert torch.equal(other[0], first[0])
        assert other[1] == first[1]


@pytest.mark.parametrize("name", ["kfac", "empirical_fisher"])
@pytest.mark.parametrize("loss", ["mse", "bce", "soft_margin"])
def test_for_other_losses(name: str, loss: str) -> None:
    for z, *_ in ranks(3, precondition, name=name, shards=[5, 0, 7], micro_batches=2, loss=loss):
        assert relative_error(z, serial(name, loss)) < 1e-9


@pytest.mark.parametrize(
    ("name", "shards"), [("kfac", [5, 7]), ("empirical_fisher", [5, 7]), ("empirical_fisher", [3, 9])]
)
def test_ignored_samples_count_alike_on_every_rank(name: str, shards: list[int]) -> None:
    truth = serial(name, ignore=4)
    assert relative_error(truth, serial(name)) > 1e-3
    for z, *_ in ranks(2, precondition, name=name, shards=shards, micro_batches=1, ignore=4):
        assert relative_error(z, truth) < 1e-9


@pytest.mark.parametrize("name", ["kfac", "nystrom"])
def test_all_ranks_hold_the_same_state(name: str) -> None:
    first, *others = (state for *_, state in ranks(4, precondition, name=name, shards=[1, 2, 4, 5], micro_batches=2))
    for other in others:
        torch.testing.assert_close(other, first, rtol=0.0, atol=0.0)


def solve(comm: Communicator, name: str, shards: list[int]) -> tuple[dhf.Solution, int]:
    objective, batch = objective_of("cross_entropy")
    with warnings.catch_warnings(), dhf.GaussNewton(objective, my_batches(comm, batch, shards, 2), comm=comm) as A:
        warnings.simplefilter("ignore")
        apply = made(name)(A, 1e-2)
        before = comm.collectives
        solution = dhf.cg(A.shifted(1e-2), -A.gradient, rtol=1e-8, preconditioner=apply)
        return solution, comm.collectives - before


@pytest.mark.parametrize("name", list(COSTS))
def test_preconditioned_cg_is_that_of_one_process(name: str) -> None:
    truth, _ = solve(dhf.connect("serial"), name, [SAMPLES])
    for solution, collectives in ranks(3, solve, name=name, shards=[2, 7, 3]):
        assert solution.reason is truth.reason
        assert abs(solution.iterations - truth.iterations) <= 3  # of 60; rounding moves the end
        assert collectives == solution.iterations + 1
        assert relative_error(solution.x, truth.x) < 1e-7


class Loses(nn.Linear):
    """A layer that on one rank vmap cannot enter."""

    def __init__(self, loses: bool) -> None:
        super().__init__(4, 3)
        self.loses = loses

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return z * float(z.detach().abs().max().item() > -1) if self.loses else z


def lost(comm: Communicator) -> None:
    torch.manual_seed(0)
    objective = dhf.Objective(Loses(comm.rank == 1).double(), nn.MSELoss())
    batch = torch.ones(2, 4, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    with dhf.GaussNewton(objective, [batch], comm=comm) as A:
        empirical_fisher(A, 1.0)


def test_what_one_rank_cannot_differentiate_is_told_by_all() -> None:
    for outcome in try_ranks(3, lost):
        assert outcome.type == "PerSampleError"
        assert outcome.text.startswith("rank 1: the loss cannot be differentiated sample by sample")


def told(comm: Communicator) -> list[str]:
    objective, batch = objective_of("mse")
    with warnings.catch_warnings(record=True) as caught, dhf.GaussNewton(objective, [batch], comm=comm) as A:
        warnings.simplefilter("always")
        KFAC()(A, 0.1)
    return [str(w.message) for w in caught if "K-FAC covers" in str(w.message)]


def test_rank_0_alone_names_what_kfac_does_not_cover() -> None:
    first, *others = ranks(3, told)
    assert len(first) == 1
    assert not any(others)


def applied_in_pieces(comm: Communicator) -> None:
    """Nystrom applied with rows on rank 1 that do not fit the vectors."""
    objective, batch = objective_of("mse")
    with dhf.GaussNewton(objective, [batch], comm=comm, vectors="sharded") as A:
        nystrom = Nystrom(rank=4, refresh=9)
        nystrom(A, 0.1)
        if comm.rank == 1:
            nystrom._vectors = nystrom._vectors[:-1]
        dhf.cg(A.shifted(0.1), A.gradient, preconditioner=nystrom(A, 0.1))


def test_what_fails_within_a_preconditioner_on_one_rank_is_raised_on_all() -> None:
    for outcome in try_ranks(2, applied_in_pieces):
        assert (outcome.type, outcome.rank) == ("RankError", 1)
        assert "size mismatch" in outcome.text
