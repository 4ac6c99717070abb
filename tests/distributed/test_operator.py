"""Operators over several ranks: the same numbers as one process, one collective per product, failures shared by all."""

from __future__ import annotations

import functools
import math
import os
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dhf
from dhf.comm import Communicator
from dhf.coordinator import Coordinator
from dhf.operator import loss_and_gradient
from tests.faults.faulty import hooked
from tests.models import problem, relative_error, split
from tests.ranks import Died, Raised, ranks, try_ranks

CURVATURES = {"hessian": dhf.Hessian, "gauss_newton": dhf.GaussNewton, "fisher": dhf.Fisher}
LOSSES = {"hessian": "bce", "gauss_newton": "cross_entropy", "fisher": "bce"}
SAMPLES = 12

# shards of 12 samples, by ranks
SHARDS = {
    "even": {1: [12], 2: [6, 6], 3: [4, 4, 4], 4: [3, 3, 3, 3]},
    "uneven": {1: [12], 2: [11, 1], 3: [2, 7, 3], 4: [1, 2, 4, 5]},
    "empty": {1: [12], 2: [0, 12], 3: [5, 0, 7], 4: [4, 5, 3, 0]},
}


def my_batches(comm: Communicator, batch: Any, shards: list[int], micro_batches: int) -> list[Any]:
    """This rank's micro-batches."""
    mine = split(batch, shards)[comm.rank]
    size = shards[comm.rank]
    if size == 0:
        return []
    cuts = [size // micro_batches + (j < size % micro_batches) for j in range(micro_batches)]
    return split(mine, [c for c in cuts if c])


def everything(comm: Communicator, curvature: str, shards: list[int], micro_batches: int) -> dict[str, Any]:
    """What an operator tells, and what its products cost."""
    objective, batch = problem("mlp", LOSSES[curvature], SAMPLES, weight_decay=0.1)
    before = comm.collectives
    with CURVATURES[curvature](objective, my_batches(comm, batch, shards, micro_batches), comm=comm) as A:
        built = comm.collectives
        v = torch.randn(A.shape[0], 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        products = torch.stack([A @ column for column in v.T])
        return {
            "loss": A.loss,
            "gradient": A.gradient,
            "products": products,
            "count": A.count,
            "build": built - before,
            "per product": (comm.collectives - built) / 3,
        }


@functools.cache
def serial(curvature: str) -> dict[str, Any]:
    return everything(dhf.connect("serial"), curvature, [SAMPLES], 1)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("shards", list(SHARDS))
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("curvature", list(CURVATURES))
def test_ranks_give_what_one_process_gives(curvature: str, size: int, shards: str, micro_batches: int) -> None:
    truth = serial(curvature)
    for found in ranks(size, everything, curvature=curvature, shards=SHARDS[shards][size], micro_batches=micro_batches):
        assert found["count"] == SAMPLES
        assert found["loss"] == pytest.approx(truth["loss"], rel=1e-12)
        assert relative_error(found["gradient"], truth["gradient"]) < 1e-12
        assert relative_error(found["products"], truth["products"]) < 1e-12
        assert found["build"] == 2
        assert found["per product"] == 1


@pytest.mark.parametrize("curvature", list(CURVATURES))
def test_all_ranks_hold_the_same_bits(curvature: str) -> None:
    first, *others = ranks(4, everything, curvature=curvature, shards=[1, 2, 4, 5], micro_batches=2)
    for other in others:
        assert other["loss"] == first["loss"]
        assert torch.equal(other["gradient"], first["gradient"])
        assert torch.equal(other["products"], first["products"])


def gradient_only(comm: Communicator, shards: list[int]) -> tuple[float, Tensor]:
    objective, batch = problem("mlp", "bce", SAMPLES, weight_decay=0.1)
    return loss_and_gradient(objective, my_batches(comm, batch, shards, 1), comm=comm)


def test_loss_and_gradient_alone() -> None:
    truth = serial("hessian")
    for loss, gradient in ranks(3, gradient_only, shards=[5, 0, 7]):
        assert loss == pytest.approx(truth["loss"], rel=1e-12)
        assert relative_error(gradient, truth["gradient"]) < 1e-12


def weighted(comm: Communicator, shards: list[int]) -> tuple[float, float, Tensor, Tensor]:
    objective, (x, y) = problem("mlp", "cross_entropy", SAMPLES)
    weight = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    objective = dhf.Objective(objective.module, nn.CrossEntropyLoss(weight, ignore_index=0))
    with dhf.GaussNewton(objective, my_batches(comm, (x, y), shards, 2), comm=comm) as A:
        return A.loss, A.count, A.gradient, A @ torch.ones(43, dtype=torch.float64)


def test_class_weights_and_ignored_samples_add_up_over_ranks() -> None:
    truth = weighted(dhf.connect("serial"), [SAMPLES])
    for found in ranks(3, weighted, shards=[1, 9, 2]):
        assert found[0] == pytest.approx(truth[0], rel=1e-12)
        assert found[1] == pytest.approx(truth[1], rel=1e-12)
        assert relative_error(found[2], truth[2]) < 1e-12
        assert relative_error(found[3], truth[3]) < 1e-12


def solve(comm: Communicator, shards: list[int]) -> tuple[dhf.Solution, int, Tensor]:
    objective, batch = problem("mlp", "mse", SAMPLES)
    with dhf.GaussNewton(objective, my_batches(comm, batch, shards, 2), comm=comm) as A:
        before = comm.collectives
        solution = dhf.cg(A.shifted(1e-2), -A.gradient, rtol=1e-8)
        return solution, comm.collectives - before, A.gradient


@pytest.mark.parametrize("size", [2, 3, 4])
def test_one_collective_per_iteration_of_cg_and_one_for_the_true_residual(size: int) -> None:
    truth, _, _ = solve(dhf.connect("serial"), [SAMPLES])
    for solution, collectives, gradient in ranks(size, solve, shards=SHARDS["uneven"][size]):
        assert solution.reason is dhf.Reason.RESIDUAL_TOLERANCE
        assert collectives == solution.iterations + 1
        assert relative_error(solution.x, truth.x) < 1e-6
        assert solution.true_residual_norm < 1.1e-8 * float(gradient.norm())


# failures


class FailsOnBuild(nn.Linear):
    """Raises in its forward pass on one rank."""

    def __init__(self, fails: bool) -> None:
        super().__init__(4, 3)
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise KeyError("no such column: temperature")
        return super().forward(x)


class _Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> Tensor:
        raise FloatingPointError("second derivative went wrong")


class _Identity(torch.autograd.Function):
    """The identity, whose second derivative raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Slope.apply(gradient)


class FailsInProduct(nn.Linear):
    """Has a gradient, but on one rank no second derivative."""

    def __init__(self, fails: bool) -> None:
        super().__init__(4, 3)
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return _Identity.apply(z) if self.fails else z


def broken(comm: Communicator, kind: str, bad: int, solver: bool) -> dict[str, Any]:
    """What this rank raises with a module that fails on rank ``bad``, and a sum over ranks afterwards."""
    torch.manual_seed(0)
    module = {"build": FailsOnBuild, "product": FailsInProduct}[kind](comm.rank == bad).double()
    objective = dhf.Objective(module, nn.MSELoss())
    batch = torch.ones(2, 4, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    caught = None
    try:
        with dhf.Hessian(objective, [batch], comm=comm) as A:
            v = torch.ones(15, dtype=torch.float64)
            _ = dhf.cg(A.shifted(1.0), v) if solver else A @ v
    except dhf.RankError as error:
        caught = error
    total = torch.ones(1, dtype=torch.float64)
    comm.all_reduce(total)
    assert caught is not None
    return {"rank": caught.rank, "text": str(caught), "trace": caught.traceback, "sum": total.item()}


@pytest.mark.parametrize("solver", [False, True])
@pytest.mark.parametrize(
    ("kind", "text", "place"),
    [
        ("build", "KeyError: 'no such column: temperature'", "in forward"),
        ("product", "FloatingPointError: second derivative went wrong", "in backward"),
    ],
)
def test_a_failing_rank_fails_all_by_name_and_the_communicator_goes_on(
    kind: str, text: str, place: str, solver: bool
) -> None:
    for found in ranks(4, broken, kind=kind, bad=2, solver=solver):
        assert found["rank"] == 2
        assert found["text"].startswith("rank 2 (")
        assert text in found["text"]
        assert place in found["trace"]
        assert found["sum"] == 4


def unusable(comm: Communicator) -> None:
    objective, (x, y) = problem("mlp", "cross_entropy")
    if comm.rank == 1:
        y[4] = 9
    dhf.Hessian(objective, [(x, y)], comm=comm)


def test_a_usage_error_on_one_rank_reaches_all() -> None:
    for outcome in try_ranks(3, unusable):
        assert outcome.type == "UsageError"
        assert outcome.text.startswith("rank 1: target 9 of sample 4")


def without_samples(comm: Communicator) -> None:
    dhf.Hessian(problem()[0], [], comm=comm)


def test_no_samples_anywhere() -> None:
    for outcome in try_ranks(2, without_samples):
        assert outcome.type == "UsageError"
        assert "no rank has a sample" in outcome.text


def moved(comm: Communicator) -> None:
    objective, batch = problem()
    with dhf.Hessian(objective, [batch], comm=comm) as A:
        if comm.rank == 1:
            A.parameters.tensors[0].data.add_(1.0)
        A @ torch.ones(43, dtype=torch.float64)


def test_parameters_that_move_on_one_rank_are_reported_on_all() -> None:
    for outcome in try_ranks(3, moved):
        assert outcome.type == "StaleGraphError"
        assert outcome.text.startswith("rank 1: parameter '0.weight' changed")


def nan_at_build(comm: Communicator) -> None:
    objective, (x, y) = problem()
    if comm.rank == 1:
        x[0, 0] = math.nan
    dhf.GaussNewton(objective, [(x, y)], comm=comm)


def test_nan_in_the_data_of_one_rank() -> None:
    for outcome in try_ranks(3, nan_at_build):
        assert outcome.type == "NonFiniteError"
        assert "from rank 1;" in outcome.text


class Poisoned(nn.Linear):
    """Finite loss and gradient, but on some ranks NaN in every product."""

    def __init__(self, bad: bool) -> None:
        super().__init__(4, 3)
        self.bad = bad

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return hooked(z, lambda given: given * math.nan) if self.bad else z


def nan_in_products(comm: Communicator, bad: list[int]) -> tuple[str, dhf.Solution]:
    torch.manual_seed(0)
    objective = dhf.Objective(Poisoned(comm.rank in bad).double(), nn.MSELoss())
    batch = torch.ones(2, 4, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    with dhf.Hessian(objective, [batch], comm=comm) as A:
        text = ""
        try:
            A @ torch.ones(15, dtype=torch.float64)
        except dhf.NonFiniteError as error:
            text = str(error)
        return text, dhf.cg(A.shifted(1.0), A.gradient)


def test_nan_in_the_products_of_some_ranks() -> None:
    for text, solution in ranks(4, nan_in_products, bad=[1, 3]):
        assert "from rank 1, rank 3;" in text
        assert solution.reason is dhf.Reason.NON_FINITE
        assert solution.iterations == 0
        assert not solution.x.any()


def diverged(comm: Communicator, bad: list[int]) -> str:
    objective, batch = problem()
    if comm.rank in bad:
        bias = objective.module[2].bias
        with torch.no_grad():
            bias[1] = torch.nextafter(bias[1], torch.tensor(math.inf, dtype=torch.float64))
    try:
        dhf.Hessian(objective, [batch], comm=comm)
    except dhf.ReplicasDivergedError as error:
        text = str(error)
    objective, batch = problem()
    dhf.Hessian(objective, [batch], comm=comm).close()  # with equal parameters all is well again
    return text


@pytest.mark.parametrize(("bad", "named"), [([2], "rank 2 "), ([1, 3], "rank 1, 3 "), ([0], "rank 1, 2, 3 ")])
def test_replicas_that_differ_by_one_bit_are_named(bad: list[int], named: str) -> None:
    for text in ranks(4, diverged, bad=bad):
        assert text.startswith(f"the parameters of {named}differ from those of rank 0")


# stopping


def stopped(comm: Communicator, signalled: int) -> tuple[dhf.Solution, Tensor, Any]:
    """A solve during whose third iteration one rank receives a signal."""
    objective, batch = problem("mlp", "mse", SAMPLES)
    seen: list[int] = []
    coordinator = Coordinator(comm, interrupted=lambda: comm.rank == signalled and len(seen) >= 4)
    shards = SHARDS["uneven"][comm.size]
    with dhf.GaussNewton(objective, my_batches(comm, batch, shards, 1), coordinator=coordinator) as A:
        system = A.shifted(1e-6)
        solution = dhf.cg(system, A.gradient, rtol=1e-12, callback=lambda iteration: seen.append(iteration.number))
        residual = A.gradient - system @ solution.x
        return solution, residual, coordinator.stopping


@pytest.mark.parametrize("signalled", [0, 2])
def test_a_stop_signal_on_one_rank_stops_all_at_the_same_iteration(signalled: int) -> None:
    for solution, residual, stopping in ranks(4, stopped, signalled=signalled):
        assert solution.reason is dhf.Reason.INTERRUPTED
        assert stopping is dhf.Reason.INTERRUPTED
        assert solution.iterations == 3
        assert solution.true_residual_norm == pytest.approx(float(residual.norm()), rel=1e-9)
        assert math.isfinite(solution.true_residual_norm)


def out_of_time(comm: Communicator, late: int) -> dhf.Solution:
    objective, batch = problem("mlp", "mse", SAMPLES)
    coordinator = Coordinator(comm)
    with dhf.GaussNewton(objective, [batch], coordinator=coordinator) as A:
        if comm.rank == late:
            coordinator.deadline = time.monotonic() - 1.0
        return dhf.cg(A.shifted(1e-6), A.gradient, rtol=1e-12, max_iterations=3)


def test_the_deadline_of_rank_0_counts_for_all() -> None:
    for solution in ranks(3, out_of_time, late=0):
        assert solution.reason is dhf.Reason.TIME_LIMIT
        assert solution.iterations == 0
        assert solution.true_residual_norm == solution.residual_norm


def test_the_clock_of_another_rank_counts_for_none() -> None:
    for solution in ranks(3, out_of_time, late=1):
        assert solution.reason is dhf.Reason.ITERATION_LIMIT
        assert solution.iterations == 3


# the coordinator's other services


def attempt(comm: Communicator) -> tuple[int, str]:
    coordinator = Coordinator(comm)
    value = coordinator.attempt(lambda: 10 * comm.rank)
    try:
        coordinator.attempt(lambda: 1 // comm.rank)
    except dhf.RankError as error:
        return value, str(error)
    return value, ""


def test_attempt_gives_every_rank_its_value_or_the_first_error() -> None:
    for rank, (value, text) in enumerate(ranks(3, attempt)):
        assert value == 10 * rank
        assert text.startswith("rank 0 (")
        assert "ZeroDivisionError" in text


def synchronise(comm: Communicator, apart: float) -> tuple[Tensor, list[float], float]:
    vector = torch.tensor([3.0, 4.0], dtype=torch.float64)
    if comm.rank == 2:
        vector[0] += apart
    numbers, distance = Coordinator(comm).synchronise(vector, [1.5 + comm.rank])
    return vector, numbers, distance


@pytest.mark.parametrize("apart", [0.0, 0.5])
def test_synchronise_hands_out_the_bits_of_rank_0(apart: float) -> None:
    for vector, numbers, distance in ranks(3, synchronise, apart=apart):
        assert vector.tolist() == [3.0, 4.0]
        assert numbers == [1.5]
        assert distance == pytest.approx(apart / 5)


# wrappers around modules that need ranks to be made


def unwrap(comm: Communicator) -> tuple[bool, str]:
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    module = nn.Linear(3, 3)
    same = dhf.Objective(DistributedDataParallel(module), nn.MSELoss()).module is module
    sharded = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(sharded[1])
    try:
        dhf.Objective(sharded, nn.MSELoss())
    except dhf.UsageError as error:
        return same, str(error)
    return same, ""


def test_ddp_is_unwrapped_and_fsdp_refused() -> None:
    for same, text in ranks(2, unwrap, fresh=True):
        assert same
        assert text.startswith("submodule '1' is wrapped by FSDP")


# the harness itself


def answer(comm: Communicator, raising: int | None = None, dying: int | None = None, hanging: int | None = None) -> int:
    if comm.rank == raising:
        raise LookupError("on purpose")
    if comm.rank == dying:
        os._exit(7)
    while comm.rank == hanging:
        time.sleep(0.01)
    return comm.rank


def test_the_harness_reports_raising_dying_and_hanging_ranks() -> None:
    outcomes = try_ranks(2, answer, raising=1)
    assert outcomes[0] == 0
    assert isinstance(outcomes[1], Raised)
    assert (outcomes[1].type, outcomes[1].text) == ("LookupError", "on purpose")
    assert try_ranks(2, answer, fresh=True, dying=0) == [Died(7), 1]
    with pytest.raises(AssertionError, match=r"ranks \[1\] gave no answer"):
        try_ranks(2, answer, fresh=True, hanging=1, patience=1.0)
    with pytest.raises(AssertionError, match="rank 1 of 2 raised LookupError: on purpose"):
        ranks(2, answer, raising=1)
    assert ranks(2, answer) == [0, 1]
