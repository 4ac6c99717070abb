"""FirstOrder against torch's own optimizers, and what a step of it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dhf
from dhf.comm import Serial
from dhf.coordinator import Coordinator
from dhf.errors import NonFiniteError
from dhf.optim import FirstOrder
from dhf.reason import Reason


class Counted(dhf.Objective):
    """Counts forward passes with a graph and without."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__(module, nn.MSELoss(), **options)
        self.with_graph = self.without = 0

    def outputs(self, batch: Any) -> Tensor:
        self.with_graph += torch.is_grad_enabled()
        self.without += not torch.is_grad_enabled()
        return super().outputs(batch)


def problem(width: int = 4) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    module = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1)).double()
    x = torch.randn(20, 3, dtype=torch.float64)
    return module, [(x, x.sum(1, keepdim=True).sin())]


def first_order(objective: dhf.Objective, method: str, **options: Any) -> FirstOrder:
    return FirstOrder(objective, Coordinator(Serial(torch.device("cpu"))), method=method, **options)


@pytest.mark.parametrize("method", ["adam", "lbfgs"])
def test_a_step_reports_the_loss_at_its_start_and_end_by_one_more_forward_pass(method: str) -> None:
    module, batches = problem()
    objective = Counted(module, weight_decay=0.1)
    optimizer = first_order(objective, method)

    def truth() -> float:
        x, y = batches[0]
        decay = sum(float(p.detach().square().sum()) for p in module.parameters())
        return float(nn.functional.mse_loss(module(x), y).detach()) + 0.05 * decay

    before = truth()
    report = optimizer.step(batches)
    assert report.loss == pytest.approx(before, rel=1e-13)
    assert report.loss_after == pytest.approx(truth(), rel=1e-13)
    assert report.loss_after < report.loss
    assert (objective.with_graph, objective.without) == (report.evaluations, 1)
    assert method == "lbfgs" or report.evaluations == 1
    assert all(p.grad is None for p in module.parameters())


def test_adam_takes_torchs_steps() -> None:
    module, batches = problem()
    twin = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    twin.load_state_dict(module.state_dict())
    torchs, optimizer = (
        torch.optim.Adam(twin.parameters(), lr=0.1),
        first_order(dhf.Objective(module, nn.MSELoss()), "adam", learning_rate=0.1),
    )
    for _ in range(5):
        torchs.zero_grad()
        nn.functional.mse_loss(twin(batches[0][0]), batches[0][1]).backward()
        torchs.step()
        optimizer.step(batches)
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-10, atol=1e-12)


def test_lbfgs_goes_on_to_the_rounding_and_then_says_that_it_does_not_move() -> None:
    module = nn.Linear(3, 1).double()
    x = torch.randn(20, 3, dtype=torch.float64)
    optimizer = first_order(dhf.Objective(module, nn.MSELoss()), "lbfgs")
    batches = [(x, x.sum(1, keepdim=True) + torch.randn(20, 1, dtype=torch.float64))]
    reports = [optimizer.step(batches) for _ in range(12)]
    assert reports[-1].gradient_norm < 1e-14
    assert {r.reason for r in reports} <= {Reason.STEP_ACCEPTED, Reason.NO_DECREASE, Reason.GRADIENT_ZERO}
    assert all((r.step_length == 0) == (r.reason is not Reason.STEP_ACCEPTED) for r in reports)
    assert reports[-1].reason is not Reason.STEP_ACCEPTED


def test_a_step_to_infinity_is_taken_back() -> None:
    module, batches = problem()
    optimizer = first_order(dhf.Objective(module, nn.MSELoss()), "adam", learning_rate=1e308)
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(NonFiniteError, match=r"a step of adam led to a loss of .*; use a smaller learning rate"):
        optimizer.step(batches)
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
