"""What is recorded for a GPU stays where it is: products and iterations, recorded and replayed on the CPU."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import torch

import dhf
from dhf.operator import GlobalOperator
from dhf.operator.whole import Whole
from dhf.preconditioners import identity
from dhf.replay import SteadyMap
from dhf.solvers import queued
from tests.models import problem
from tests.recorded import RecordedOnCpu, record_on_cpu

MATRICES = {"hessian": dhf.Hessian, "ggn": dhf.GaussNewton, "fisher": dhf.Fisher, "rows": dhf.ResidualJacobian}


@pytest.mark.parametrize("products", ["retained", "traced"])
@pytest.mark.parametrize("kind", MATRICES)
def test_replayed_products_are_those_of_the_graphs(kind: str, products: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = problem("mlp", "mse", weight_decay=0.01)
    open_it: Any = lambda: MATRICES[kind](objective, [batch, batch], products=products)  # noqa: E731
    vectors = torch.randn(6, sum(p.numel() for p in objective.module.parameters()), dtype=torch.float64)
    with open_it() as A:
        truth = [A @ v for v in vectors]
    record_on_cpu(monkeypatch)
    with open_it() as A:
        for v, expected in zip(vectors, truth, strict=True):
            torch.testing.assert_close(A @ v, expected, rtol=1e-13, atol=1e-13)
            gc.collect()
    assert RecordedOnCpu.replayed == 4  # after one that is done, and one that is recorded


@pytest.mark.parametrize("preconditioner", ["none", "identity", "jacobi", "empirical-fisher", "nystrom", "kfac"])
def test_replayed_iterations_are_those_that_are_launched(preconditioner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = problem("mlp", "cross_entropy", weight_decay=0.01)

    def solve() -> dhf.Solution:
        with dhf.GaussNewton(objective, [batch]) as A:
            M: Any = {
                "none": lambda *_: None,
                "identity": identity,
                "jacobi": dhf.jacobi,
                "empirical-fisher": dhf.empirical_fisher,
                "nystrom": dhf.Nystrom(rank=4),
                "kfac": dhf.KFAC(),
            }[preconditioner](A, 0.1)
            assert M is None or isinstance(M, SteadyMap)
            return dhf.cg(A.shifted(0.1), -A.gradient, rtol=1e-6, preconditioner=M)

    monkeypatch.setattr(queued, "_BRIEF", math.inf)
    monkeypatch.setattr(GlobalOperator, "queues", property(lambda A: isinstance(A._reduction, Whole)))
    launched = solve()
    record_on_cpu(monkeypatch)
    replayed = solve()
    assert launched.iterations > 8
    assert RecordedOnCpu.replayed > launched.iterations  # products, and iterations once symmetry has been looked at
    assert (replayed.reason, replayed.iterations) == (launched.reason, launched.iterations)
    torch.testing.assert_close(replayed.x, launched.x, rtol=1e-12, atol=1e-14)


def test_what_is_seen_in_a_replay_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = problem("mlp", "mse")
    record_on_cpu(monkeypatch)
    with dhf.GaussNewton(objective, [batch]) as A:
        v = torch.ones_like(A.gradient)
        for _ in range(3):
            A @ v
        A.agree(None)  # of which nothing is not finite
        assert RecordedOnCpu.replayed == 1
        verdict = A.apply(v * math.nan)[1]
        assert RecordedOnCpu.replayed == 2
        assert verdict.reason is dhf.Reason.NON_FINITE
        assert A.non_finite == {0: None}
        assert A.apply(v)[1].reason is None
