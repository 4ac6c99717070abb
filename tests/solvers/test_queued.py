"""QueuedConjugateGradients against ConjugateGradients, on the CPU, where a GPU's waiting is all that is missing, and on a GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import dhf
from dhf.operator import GlobalOperator
from dhf.operator.whole import Whole
from dhf.reason import Reason
from dhf.replay import SteadyMap
from dhf.solvers import queued
from tests.models import problem

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Products are queued on this device, and the next one is always begun early."""
    monkeypatch.setattr(queued, "_BRIEF", math.inf)
    return request.param


def _whole(operator: GlobalOperator) -> bool:
    return isinstance(operator._reduction, Whole)


def both(monkeypatch: pytest.MonkeyPatch, solve: Any) -> tuple[Any, Any]:
    """What ``solve()`` gives by each of the two recursions."""
    found = []
    for queues in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(GlobalOperator, "queues", property(_whole if queues else lambda operator: False))
            found.append(solve())
    return found[0], found[1]


def same(plain: dhf.Solution, ahead: dhf.Solution, rtol: float = 1e-6) -> None:
    assert ahead.reason is plain.reason
    assert ahead.iterations == plain.iterations
    assert len(ahead.history) == len(plain.history)
    torch.testing.assert_close(ahead.x, plain.x, rtol=rtol, atol=rtol * float(plain.x.abs().max()))
    for ours, theirs in zip(ahead.history, plain.history, strict=True):
        assert ours.number == theirs.number
        assert ours.model == pytest.approx(theirs.model, rel=1e-6, abs=1e-12, nan_ok=True)
        if ours.number <= 6:  # later, the recursion has multiplied its rounding
            assert ours.residual_norm == pytest.approx(theirs.residual_norm, rel=1e-6, nan_ok=True)
            assert ours.curvature == pytest.approx(theirs.curvature, rel=1e-6, nan_ok=True)
    assert [i.number for i in ahead.iterates] == [i.number for i in plain.iterates]
    for snapshot, reference in zip(ahead.iterates, plain.iterates, strict=True):
        torch.testing.assert_close(snapshot.x, reference.x, rtol=1e-3, atol=1e-5)
    if plain.true_residual_norm == plain.true_residual_norm:
        assert ahead.true_residual_norm == pytest.approx(plain.true_residual_norm, rel=0.5, abs=1e-12)


def on(device: str, **options: Any) -> tuple[dhf.Objective, Any]:
    objective, batch = problem("mlp", "cross_entropy", **options)
    objective.module.to(device)
    return objective, tuple(t.to(device) for t in batch)


@pytest.mark.parametrize("damping", [0.3, 1.0])
@pytest.mark.parametrize("preconditioner", ["none", "nystrom", "plain function"])
def test_the_same_solution(device: str, preconditioner: str, damping: float, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = on(device, weight_decay=0.01)

    def solve() -> dhf.Solution:
        seen: list[int] = []
        with dhf.GaussNewton(objective, [batch]) as A:
            M: Any = None
            if preconditioner == "nystrom":
                M = dhf.Nystrom(rank=5)(A, damping)
                assert isinstance(M, SteadyMap)
            elif preconditioner == "plain function":
                M = lambda r: r / (torch.arange(len(r), device=r.device, dtype=r.dtype) + 1)  # noqa: E731
            solution = dhf.cg(
                A.shifted(damping),
                -A.gradient,
                rtol=1e-8,
                preconditioner=M,
                snapshot_ratio=1.3,
                callback=lambda i: seen.append(i.number),
            )
        assert seen == [i.number for i in solution.history]
        return solution

    plain, ahead = both(monkeypatch, solve)
    assert plain.reason is Reason.RESIDUAL_TOLERANCE
    assert plain.iterations > 5
    same(plain, ahead)


def test_a_start_a_limit_and_the_model(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = on(device)

    def solve(**options: Any) -> Any:
        def run() -> dhf.Solution:
            with dhf.GaussNewton(objective, [batch]) as A:
                start = torch.linspace(-1, 1, A.shape[0], dtype=A.dtype, device=A.device)
                return dhf.cg(A.shifted(0.1), -A.gradient, x0=start, **options)

        return run

    for options in ({"max_iterations": 7}, {"max_iterations": 1}, {"progress_tolerance": 1e-2, "rtol": 0.0}):
        plain, ahead = both(monkeypatch, solve(**options))
        assert plain.reason in (Reason.ITERATION_LIMIT, Reason.RELATIVE_PROGRESS)
        same(plain, ahead)


def test_negative_curvature(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = on(device)

    def solve() -> dhf.Solution:
        with dhf.Hessian(objective, [batch]) as A:
            return dhf.cg(A, -A.gradient, rtol=1e-10)

    plain, ahead = both(monkeypatch, solve)
    assert plain.reason is Reason.NEGATIVE_CURVATURE
    same(plain, ahead)
    assert plain.direction is not None
    assert ahead.direction is not None
    torch.testing.assert_close(ahead.direction, plain.direction, rtol=1e-7, atol=1e-9)


def test_products_are_counted_with_the_one_that_was_begun_in_vain(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = on(device)

    def solve() -> int:
        with dhf.GaussNewton(objective, [batch]) as A:
            dhf.cg(A.shifted(1.0), -A.gradient, rtol=1e-6)
            return A.products

    plain, ahead = both(monkeypatch, solve)
    assert ahead == plain + 1


def test_a_broken_product_ends_the_solve_where_it_stands(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = on(device)

    def solve() -> dhf.Solution:
        with dhf.GaussNewton(objective, [batch]) as A:
            shard = A._open_shard()
            multiply, calls = shard.product, [0]

            def product(v: Tensor, out: Tensor, *args: Any, **options: Any) -> None:
                multiply(v, out, *args, **options)
                calls[0] += 1
                if calls[0] == 4:
                    out[0] = math.nan

            monkeypatch.setattr(shard, "product", product)
            monkeypatch.setattr("dhf.replay.Replay._record", lambda *_: None)  # the fault is the host's
            solution = dhf.cg(A.shifted(1e-3), -A.gradient, rtol=1e-12)
            assert A.non_finite == {0: None}  # though the product that was begun meanwhile is finite
            return solution

    plain, ahead = both(monkeypatch, solve)
    assert plain.reason is Reason.NON_FINITE
    assert plain.iterations == 3
    same(plain, ahead)


def test_parameters_that_moved_are_noticed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = on(device)

    def move(iteration: Any) -> None:
        if iteration.number == 3:
            next(objective.module.parameters()).data.add_(1.0)

    def solve() -> None:
        with dhf.GaussNewton(objective, [batch]) as A, pytest.raises(dhf.StaleGraphError):
            dhf.cg(A.shifted(1e-3), -A.gradient, rtol=1e-12, callback=move)

    both(monkeypatch, solve)


def test_what_fails_on_the_host_is_raised(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = on(device)

    def fail(iteration: Any) -> None:
        if iteration.number == 2:
            raise KeyError("mine")

    def solve() -> None:
        with dhf.GaussNewton(objective, [batch]) as A, pytest.raises(KeyError, match="mine"):
            dhf.cg(A.shifted(1e-3), -A.gradient, rtol=1e-12, callback=fail)

    both(monkeypatch, solve)


def test_asymmetry_is_found(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = on(device)

    def solve() -> dhf.Solution:
        with dhf.GaussNewton(objective, [batch]) as A:
            shard = A._open_shard()
            multiply = shard.product

            def product(v: Tensor, out: Tensor, *args: Any, **options: Any) -> None:
                multiply(v, out, *args, **options)
                out.add_(v.roll(1), alpha=5.0)

            monkeypatch.setattr(shard, "product", product)
            return dhf.cg(A.shifted(10.0), -A.gradient, rtol=1e-12)

    plain, ahead = both(monkeypatch, solve)
    assert plain.reason is Reason.NOT_SYMMETRIC
    same(plain, ahead)


def test_a_stop_signal_is_heard(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = on(device)

    def solve() -> dhf.Solution:
        from dhf.comm import Serial
        from dhf.coordinator import Coordinator

        told = [False]
        coordinator = Coordinator(Serial(torch.device(device)), interrupted=lambda: told[0])
        with dhf.GaussNewton(objective, [batch], coordinator=coordinator) as A:

            def stop(iteration: Any) -> None:
                told[0] = iteration.number >= 3

            return dhf.cg(A.shifted(1e-3), -A.gradient, rtol=1e-12, callback=stop)

    plain, ahead = both(monkeypatch, solve)
    assert plain.reason is Reason.INTERRUPTED
    same(plain, ahead)
