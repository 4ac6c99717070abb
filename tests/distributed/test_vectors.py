"""Vectors in pieces, products reduced in parts, products rounded on their way: what replicated vectors give in one all-reduce."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dhf
from dhf.comm import Communicator
from tests.distributed import test_parity
from tests.distributed.test_operator import SAMPLES, SHARDS, my_batches
from tests.distributed.test_parity import compare, problem, train
from tests.models import problem as model
from tests.models import relative_error
from tests.ranks import Raised, ranks, try_ranks

KFAC, PLAIN, NEWTON = {"preset": "deep-net"}, {"preset": "deep-net", "preconditioner": "none"}, {"preset": "newton"}
OPTIONS = [
    *(options for options in test_parity.OPTIONS if options.get("solver") != "direct"),
    {"preset": "deep-net", "warm_start_decay": 0.9},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize(("size", "split"), [(2, "uneven"), (3, "even"), (4, "empty")])
def test_ranks_with_pieces_train_as_one_with_all(size: int, split: str, options: dict[str, Any]) -> None:
    compare(size, split, 4, {**options, "vectors": "sharded"}, "bce")


@pytest.mark.parametrize("preconditioner", ["nystrom", "none"])
@pytest.mark.parametrize("size", [2, 4])
def test_least_squares_in_pieces(size: int, preconditioner: str) -> None:
    options = {"solver": "cgls", "preconditioner": preconditioner, "damping": 1.0, "vectors": "sharded"}
    compare(size, "uneven", 4, options, "least-squares")


@pytest.mark.parametrize("options", [KFAC, PLAIN, NEWTON], ids=["kfac", "none", "newton"])
@pytest.mark.parametrize("micro", [None, 4])
@pytest.mark.parametrize("size", [2, 4])
def test_parts_give_the_same(size: int, micro: int | None, options: dict[str, Any]) -> None:
    compare(size, "uneven", micro, {**options, "bucket_mb": 1e-4}, "bce")


@pytest.mark.parametrize("micro", [None, 4])
def test_parts_of_two_ranks_give_the_same_bits(micro: int | None) -> None:
    runs = [
        ranks(2, train, split="uneven", micro=micro, options={**KFAC, "bucket_mb": mb}, loss="bce")
        for mb in (0.0, 1e-4, 1e-5)
    ]
    for rows, parameters, collectives in (run[0] for run in runs[1:]):
        assert rows == runs[0][0][0]
        assert torch.equal(parameters, runs[0][0][1])
        assert collectives > runs[0][0][2]


def multiply(comm: Communicator, shards: list[int], vectors: str) -> dict[str, Any]:
    """Products, gradient and inner products of a rank, put together again."""
    objective, batch = model("layernorm", "cross_entropy", SAMPLES, weight_decay=0.01)
    with dhf.Hessian(objective, my_batches(comm, batch, shards, 2), comm=comm, vectors=vectors) as A:
        n = A.shape[0]
        V = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        products = torch.stack([A.space.whole(A @ A.space.piece(v)) for v in V])
        shifted = A.space.whole(A.shifted(0.5) @ A.space.piece(V[0]))
        v = A.space.piece(V[0])
        before = comm.collectives
        product, _ = A.apply(v)
        first = comm.collectives - before
        known = A.space.dots((v, product), (v, v), (product, product))
        free = comm.collectives - before - first
        product.add_(1.0)
        changed = A.space.dots((v, product))[0]
        return {
            "products": products,
            "shifted": shifted,
            "gradient": A.space.whole(A.gradient),
            "held": A.gradient.numel(),
            "n": n,
            "first": first,
            "free": free,
            "known": known,
            "changed": changed,
            "truth": [float(V[0] @ products[0]), float(V[0] @ V[0]), float(products[0] @ products[0])],
            "changed_truth": float(V[0] @ (products[0] + 1.0)),
            "asymmetry": float(V[1] @ products[0] - V[0] @ products[1]),
        }


@pytest.mark.parametrize(("size", "shards"), [(1, "even"), (2, "uneven"), (3, "empty"), (4, "even")])
def test_products_in_pieces(size: int, shards: str) -> None:
    truth = multiply(dhf.connect("serial"), [SAMPLES], "replicated")
    for found in ranks(size, multiply, shards=SHARDS[shards][size], vectors="sharded"):
        for name in ("products", "shifted", "gradient"):
            assert relative_error(found[name], truth[name]) < 1e-12
        assert found["held"] == -(-truth["n"] // size)
        assert found["known"] == pytest.approx(found["truth"], rel=1e-12)
        assert found["changed"] == pytest.approx(found["changed_truth"], rel=1e-12)
        assert abs(found["asymmetry"]) < 1e-12
        if size > 1:
            # gather, reduce-scatter, and the status, with which the inner products ride
            assert (found["first"], found["free"]) == (3, 0)


def buffers_left(comm: Communicator, options: dict[str, Any]) -> bool:
    """Whether an operator's buffers outlive it until the garbage collector comes."""
    objective, batch = model("layernorm", "cross_entropy", SAMPLES)
    gc.collect()
    gc.disable()
    try:
        with dhf.GaussNewton(objective, my_batches(comm, batch, [6, 6], 1), comm=comm, **options) as A:
            dhf.cg(A.shifted(1.0), -A.gradient, max_iterations=2)
            holder = weakref.ref(getattr(A._reduction, "_sender", A._reduction))
        del A
        return holder() is not None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "options", [{}, {"bucket_bytes": 100}, {"vectors": "sharded"}], ids=["whole", "parts", "pieces"]
)
def test_buffers_go_with_their_operator(options: dict[str, Any]) -> None:
    assert not any(ranks(2, buffers_left, options=options))


def solve(comm: Communicator, shards: list[int], vectors: str, fails: str = "") -> dhf.Solution:
    objective, batch = model("layernorm", "cross_entropy", SAMPLES, weight_decay=0.01)
    calls = []

    def precondition(r: Tensor) -> Tensor:
        calls.append(r)
        if fails == "preconditioner" and comm.rank == 1 and len(calls) == 3:
            raise OSError("no such file")
        return 0.5 * r

    def watch(iteration: Any) -> None:
        if fails == "callback" and comm.rank == 1 and iteration.number == 2:
            raise OSError("no such file")

    with dhf.GaussNewton(objective, my_batches(comm, batch, shards, 2), comm=comm, vectors=vectors) as A:
        solution = dhf.cg(A.shifted(0.1), -A.gradient, rtol=1e-9, preconditioner=precondition, callback=watch)
        solution.x.data = A.space.whole(solution.x)
        return solution


@pytest.mark.parametrize("fails", ["preconditioner", "callback"])
@pytest.mark.parametrize("vectors", ["replicated", "sharded"])
def test_what_fails_on_one_rank_is_told_to_all(vectors: str, fails: str) -> None:
    for outcome in try_ranks(3, solve, shards=[4, 4, 4], vectors=vectors, fails=fails):
        assert isinstance(outcome, Raised)
        assert (outcome.type, outcome.rank) == ("RankError", 1)
        assert "no such file" in outcome.text


def test_a_piece_of_the_wrong_length() -> None:
    for outcome in try_ranks(2, multiply_wrongly):
        assert isinstance(outcome, Raised)
        assert "expected a piece of shape" in outcome.text


def multiply_wrongly(comm: Communicator) -> None:
    objective, batch = model("layernorm", "cross_entropy", SAMPLES)
    with dhf.GaussNewton(objective, my_batches(comm, batch, [6, 6], 1), comm=comm, vectors="sharded") as A:
        _ = A @ torch.zeros(A.shape[0], dtype=torch.float64)


def compressed(comm: Communicator, rtol: float) -> tuple[dhf.Solution, float, Tensor, float]:
    """A solve with rounded products; its true residual by another operator, the exact solution, and a product's error."""
    objective, batch = model("layernorm", "cross_entropy", SAMPLES, weight_decay=0.01)
    with dhf.GaussNewton(objective, my_batches(comm, batch, [2, 7, 3][: comm.size], 2), comm=comm) as A:
        b = -A.gradient
        solution = dhf.cg(A.compressed(1e-2), b, rtol=rtol, max_iterations=400)
        residual = float((b - A.shifted(1e-2) @ solution.x).norm() / b.norm())
        exact = dhf.cg(A.shifted(1e-2), b, rtol=1e-12).x
        rough, fine = A.compressed(1e-2) @ b, A.shifted(1e-2) @ b
        return solution, residual, exact, relative_error(rough, fine)


@pytest.mark.parametrize("rtol", [1e-3, 1e-8])
def test_rounded_products_reach_the_same_true_residual(rtol: float) -> None:
    for solution, residual, exact, error in ranks(3, compressed, rtol=rtol):
        assert 1e-5 < error < 2e-2  # it has been rounded
        assert solution.reason is dhf.Reason.RESIDUAL_TOLERANCE
        assert residual <= 1.01 * rtol
        assert solution.true_residual_norm == pytest.approx(
            residual * float(solution.history[0].residual_norm), rel=1e-3
        )
        assert relative_error(solution.x, exact) < 1e3 * rtol


def train_compressed(comm: Communicator) -> tuple[float, float]:
    losses = []
    for dtype in ("full", "bfloat16"):
        objective, x, y = problem("bce")
        mine = slice(12 * comm.rank, 12 * comm.rank + 12)
        optimizer = dhf.HessianFree(objective, comm=comm, preset="deep-net", reduce_dtype=dtype)
        for _ in range(10):
            report = optimizer.step([(x[mine], y[mine])])
        losses.append(report.loss_after)
    return losses[0], losses[1]


def test_training_with_rounded_products() -> None:
    for full, rounded in ranks(3, train_compressed):
        assert full != rounded
        assert rounded == pytest.approx(full, rel=2e-2)


def resumed(comm: Communicator, preconditioner: str, gathered: int) -> tuple[Tensor, Tensor]:
    """Parameters after four steps, and after two, a state that went over disk, and two more.

    ``gathered`` is how often the ranks put the state together before it is taken.
    """
    objective, x, y = problem("bce")
    mine = slice(12 * comm.rank, 12 * comm.rank + 12)
    options: dict[str, Any] = {
        "comm": comm,
        "preset": "deep-net",
        "preconditioner": preconditioner,
        "preconditioner_refresh": 3,
        "vectors": "sharded",
    }
    optimizer = dhf.HessianFree(objective, **options)
    for _ in range(2):
        optimizer.step([(x[mine], y[mine])])
    for _ in range(gathered):
        optimizer.consolidate_state_dict()
    state, weights = optimizer.state_dict(), copy.deepcopy(objective.module.state_dict())
    stored = comm.gather_objects(state)[0]  # rank 0's is what is written
    buffer = io.BytesIO()
    torch.save(stored, buffer)
    for _ in range(2):
        optimizer.step([(x[mine], y[mine])])
    went_on = nn.utils.parameters_to_vector(objective.module.parameters()).detach().clone()
    objective.module.load_state_dict(weights)
    again = dhf.HessianFree(objective, **options)
    buffer.seek(0)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    for _ in range(2):
        again.step([(x[mine], y[mine])])
    return went_on, nn.utils.parameters_to_vector(objective.module.parameters()).detach().clone()


@pytest.mark.parametrize("gathered", [1, 2])
@pytest.mark.parametrize("preconditioner", ["kfac", "nystrom"])
def test_a_resumed_run_with_pieces_is_bitwise_the_same(preconditioner: str, gathered: int) -> None:
    undisturbed, _ = ranks(3, resumed, preconditioner=preconditioner, gathered=0)[0]
    for went_on, again in ranks(3, resumed, preconditioner=preconditioner, gathered=gathered):
        assert torch.equal(went_on, again)
        assert torch.equal(went_on, undisturbed)


@pytest.mark.parametrize("preconditioner", ["kfac", "nystrom"])
def test_a_state_that_one_rank_saved_alone_makes_the_preconditioner_anew(preconditioner: str) -> None:
    """As the last survivor of a run does; its own piece must not be taken for the whole."""
    for went_on, again in ranks(3, resumed, preconditioner=preconditioner, gathered=0):
        assert relative_error(again, went_on) < 0.05
