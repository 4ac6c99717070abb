"""Eigenvalues, traces, densities and influence over several ranks: as one process has them, stops agreed, failures shared."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor, nn

import dhf
from dhf.comm import Communicator
from dhf.coordinator import Coordinator
from tests.distributed.test_agreement import SEEDS
from tests.distributed.test_operator import SAMPLES, SHARDS, Poisoned, my_batches
from tests.models import LOSSES, dense_hessian, problem, split
from tests.ranks import ranks, try_ranks

LOSS = "cross_entropy"


def everything(comm: Communicator, shards: list[int], vectors: str) -> dict[str, Any]:
    """All that can be asked of a spectrum, and the collectives of a search."""
    objective, batch = problem("mlp", LOSS, SAMPLES, weight_decay=0.01)
    mine = my_batches(comm, batch, shards, 2)
    found: dict[str, Any] = {}
    with dhf.Hessian(objective, mine, comm=comm, vectors=vectors) as A:
        before = comm.collectives
        for which in ("largest", "smallest", "magnitude"):
            pairs = dhf.eigsh(A, 4, which=which, tol=1e-10, basis=20)
            found[which], found[f"{which} vectors"] = (
                pairs.values,
                torch.stack([A.space.whole(x) for x in pairs.vectors.T]),
            )
            found["reason"] = pairs.reason
        found["collectives"] = (comm.collectives - before, A.products)
        found["shifted"] = dhf.eigsh(A.shifted(1.0), 2, tol=1e-10).values
        found["trace"] = torch.tensor([A.trace(products=24).value, A.trace(products=24).standard_error])
        found["diagonal"] = A.space.whole(A.diagonal(products=24).values)
        density = dhf.spectral_density(A, samples=2, steps=6)
        found["density"] = torch.stack([density.nodes, density.weights])
    return found


def influences(comm: Communicator, shards: list[int]) -> tuple[Tensor, int]:
    """Scores of this rank, and where they begin."""
    objective, batch = problem("mlp", LOSS, SAMPLES, weight_decay=0.01)
    queries = split(problem("mlp", LOSS, 5, seed=3)[1], [1, 3, 1])
    found = dhf.influence(objective, my_batches(comm, batch, shards, 2), queries, comm=comm, damping=0.2, rtol=1e-12)
    assert found.converged
    return found.scores, found.first_row


@functools.cache
def alone() -> dict[str, Any]:
    """What one process finds."""
    return everything(dhf.connect("serial"), [SAMPLES], "replicated")


@pytest.mark.parametrize(
    ("size", "shards", "vectors"),
    [(1, "even", "replicated"), (2, "uneven", "replicated"), (4, "empty", "replicated"), (2, "uneven", "sharded")],
)
def test_ranks_find_what_one_process_finds(size: int, shards: str, vectors: str) -> None:
    truth = alone()
    first, *others = ranks(size, everything, shards=SHARDS[shards][size], vectors=vectors)
    for name, value in truth.items():
        if isinstance(value, Tensor):
            slack = 1e-7 if "vectors" in name else 1e-11
            torch.testing.assert_close(first[name], value, rtol=1e-9, atol=slack, msg=lambda m, n=name: f"{n}: {m}")
            assert all(torch.equal(other[name], first[name]) for other in others), name
    collectives, products = first["collectives"]
    if vectors == "replicated":
        assert collectives == products + 2 * 3  # two verdicts end each search
    assert all(other["collectives"] == first["collectives"] for other in others)
    assert first["reason"] is truth["reason"] is dhf.Reason.RESIDUAL_TOLERANCE


def test_values_are_those_of_the_dense_hessian() -> None:
    objective, batch = problem("mlp", LOSS, SAMPLES, weight_decay=0.01)
    values = torch.linalg.eigvalsh(dense_hessian(objective.module, batch, LOSSES[LOSS][1], 0.01))
    found = alone()
    torch.testing.assert_close(found["largest"], values.flip(0)[:4], rtol=0, atol=1e-10)
    torch.testing.assert_close(found["smallest"], values[:4], rtol=0, atol=1e-10)
    torch.testing.assert_close(found["shifted"], values.flip(0)[:2] + 1, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("size", "shards"), [(1, "even"), (2, "uneven"), (2, "empty"), (4, "uneven")])
def test_each_rank_scores_its_own_samples(size: int, shards: str) -> None:
    truth, _ = influences(dhf.connect("serial"), [SAMPLES])
    found = ranks(size, influences, shards=SHARDS[shards][size])
    assert [first for _, first in found] == [sum(SHARDS[shards][size][:r]) for r in range(size)]
    torch.testing.assert_close(torch.cat([scores for scores, _ in found], 1), truth, rtol=1e-9, atol=1e-13)


# agreement


class Watched:
    """Counts products and verdicts that met different proposals; its products are off by some units in the last place."""

    def __init__(self, A: Any, name: int, ulps: int) -> None:
        self._A, self.space, self.mixed = A, A.space, 0
        self._generator, self._ulps = torch.Generator().manual_seed(name), ulps
        self.shape, self.dtype, self.device = A.shape, A.dtype, A.device

    def apply(self, v: Tensor, *agreement: Any) -> tuple[Tensor, Any]:
        product, verdict = self._A.apply(v, *agreement)
        self.mixed += not verdict.valid
        off = torch.randint(-self._ulps, self._ulps + 1, product.shape, generator=self._generator)
        return product * (1 + off.double() * 2.0**-52), verdict

    def agree(self, *agreement: Any) -> Any:
        verdict = self._A.agree(*agreement)
        self.mixed += not verdict.valid
        return verdict


def search_disturbed(
    comm: Communicator, disturbed: list[int], at: int, basis: int | None
) -> list[tuple[dhf.Eigenpairs, int]]:
    """Disturbed searches, each taken twice: to see what the ranks find, and with one rank's bound as tolerance."""
    objective, batch = problem("mlp", LOSS, SAMPLES)
    found = []
    with dhf.Hessian(objective, my_batches(comm, batch, SHARDS["even"][4], 1), comm=comm) as A:
        for seed in range(SEEDS):
            name, ulps = 1000 * seed + comm.rank, 1 if comm.rank in disturbed else 0
            options: dict[str, Any] = {"which": "magnitude", "basis": basis}
            seen = dhf.eigsh(Watched(A, name, ulps), 2, tol=1e-14, max_iterations=at, true_residual=False, **options)
            bound = float(seen.error_bounds.max()) / float(seen.values.abs().max())
            tol = comm.gather_objects(bound)[seed % comm.size]
            again = Watched(A, name, ulps)
            found.append((dhf.eigsh(again, 2, tol=tol, max_iterations=100, **options), again.mixed))
    return found


@pytest.mark.parametrize("disturbed", [[3], [0, 1, 2, 3]], ids=["last rank", "all ranks"])
@pytest.mark.parametrize(("at", "basis"), [(6, None), (6, 6)], ids=["on the way", "where the basis is full"])
def test_all_ranks_stop_together(at: int, basis: int | None, disturbed: list[int]) -> None:
    cases = list(zip(*ranks(4, search_disturbed, disturbed=disturbed, at=at, basis=basis), strict=True))
    for (pairs, mixed), *others in cases:
        assert pairs.reason is dhf.Reason.RESIDUAL_TOLERANCE
        for other, their_mixed in others:
            assert (other.reason, other.products, their_mixed) == (pairs.reason, pairs.products, mixed)
            torch.testing.assert_close(other.values, pairs.values, rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(other.vectors, pairs.vectors, rtol=0, atol=1e-9)
    assert any(mixed for (_, mixed), *_ in cases), "no case was close enough for the ranks to disagree"


# failures


def broken(comm: Communicator) -> tuple[dhf.Reason, int, str]:
    """A search and a trace with NaN in the products of rank 1."""
    torch.manual_seed(0)
    objective = dhf.Objective(Poisoned(comm.rank == 1).double(), nn.MSELoss())
    batch = torch.ones(2, 4, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    with dhf.Hessian(objective, [batch], comm=comm) as A:
        pairs = dhf.eigsh(A, 2)
        with pytest.raises(dhf.NonFiniteError) as raised:
            A.trace(products=5)
        return pairs.reason, len(pairs.values), str(raised.value)


def test_nan_on_one_rank_ends_all() -> None:
    for reason, count, words in ranks(2, broken):
        assert (reason, count) == (dhf.Reason.NON_FINITE, 0)
        assert "NaN or infinity" in words


def failing(comm: Communicator, what: str) -> None:
    """Products that raise on rank 1, different starts for SciPy, or different queries."""
    objective, batch = problem("mlp", "mse", SAMPLES)
    mine = my_batches(comm, batch, SHARDS["even"][2], 1)
    with dhf.Hessian(objective, mine, comm=comm) as A:
        if what == "scipy":
            A.to_scipy().matvec(torch.full((43,), 1.0 + comm.rank).double().numpy())
        elif what == "query":
            dhf.influence(objective, mine, [batch] * (1 + comm.rank), comm=comm)
        elif what == "order of queries":
            dhf.influence(objective, mine, split(batch, [1] * SAMPLES)[:: -1 if comm.rank else 1], comm=comm)
        elif comm.rank == 1:
            A._shard.product = failed  # type: ignore[method-assign, union-attr]
        if what == "eigsh":
            dhf.eigsh(A, 3)
        elif what == "trace":
            A.trace(products=9)


def failed(*_: Any, **__: Any) -> None:
    """A product."""
    raise LookupError("no such block")


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        ("eigsh", "RankError", "LookupError: no such block"),
        ("trace", "RankError", "LookupError: no such block"),
        ("scipy", "RanksDifferError", "give SciPy's solver the same start"),
        ("query", "RanksDifferError", "number of queries: 2 there, 1 on rank 0"),
        ("order of queries", "RanksDifferError", "rank 1 differs from rank 0 in queries: hash"),
    ],
)
def test_what_goes_wrong_on_one_rank_reaches_all(what: str, error: str, words: str) -> None:
    for outcome in try_ranks(2, failing, what=what):
        assert outcome.type == error
        assert words in outcome.text


def with_scipy(comm: Communicator) -> Tensor:
    """SciPy's own search on every rank."""
    objective, batch = problem("mlp", LOSS, SAMPLES)
    with dhf.Hessian(objective, my_batches(comm, batch, SHARDS["uneven"][2], 1), comm=comm) as A:
        v0 = torch.ones(43).double().numpy()
        return torch.from_numpy(scipy.sparse.linalg.eigsh(A.to_scipy(), k=3, which="LA", v0=v0)[0])


def test_scipy_searches_on_all_ranks_alike() -> None:
    objective, batch = problem("mlp", LOSS, SAMPLES)
    values = torch.linalg.eigvalsh(dense_hessian(objective.module, batch, LOSSES[LOSS][1]))
    for found in ranks(2, with_scipy):
        torch.testing.assert_close(found.sort().values, values[-3:], rtol=1e-10, atol=1e-12)


def interrupted(comm: Communicator) -> tuple[dhf.Reason, int, bool]:
    """A search during whose seventh product rank 1 has a stop signal."""
    objective, batch = problem("mlp", LOSS, SAMPLES)
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return comm.rank == comm.size - 1 and asked > 10

    coordinator = Coordinator(comm, interrupted=stop)
    mine = my_batches(comm, batch, SHARDS["even"][comm.size], 1)
    with dhf.Hessian(objective, mine, coordinator=coordinator) as A:
        pairs = dhf.eigsh(A, 3, tol=0.0)
        return pairs.reason, A.products, bool(pairs.residual_norms.isnan().all()) and len(pairs.values) == 3


@pytest.mark.parametrize("size", [1, 2])
def test_a_stop_signal_ends_a_search_with_what_it_has(size: int) -> None:
    first, *others = ranks(size, interrupted)
    assert first[0] is dhf.Reason.INTERRUPTED
    assert 5 < first[1] < 15
    assert first[2]
    assert all(other == first for other in others)
