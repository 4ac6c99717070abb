"""What a step chooses by itself, and how it climbs down when its first try fails."""

import pytest
import torch
from torch import Tensor, nn

import dhf
from dhf.optim.trial import Trial, Tried


class Curve(dhf.LeastSquares):
    """Residuals of ``exp(a t) + b`` against points; a batch is (t, y)."""

    def outputs(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        t, y = batch
        a, b = self.module.weight[0, 0], self.module.weight[0, 1]
        return torch.exp(a * t) + b - y


def curve(start: tuple[float, float]) -> tuple[Curve, list]:
    module = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([start], dtype=torch.float64))
    t = torch.linspace(0, 3, 20, dtype=torch.float64)
    return Curve(module), [(t, torch.exp(0.7 * t) - 1.0)]


def test_a_small_sum_of_squares_is_solved_directly_and_said():
    objective, batches = curve((0.1, 0.0))
    optimizer = dhf.HessianFree(objective)
    assert optimizer.notes == ["preset least-squares: ggn matrix, solver auto, nielsen"]
    reports = [optimizer.step(batches) for _ in range(40)]
    assert optimizer.notes[1:] == ["solver direct: it factorises a 2 x 2 matrix in parameter space"]
    assert reports[-1].loss_after < 1e-25
    assert objective.module.weight.detach().flatten().tolist() == pytest.approx([0.7, -1.0], rel=1e-10)


def test_more_damping_is_tried_in_the_same_step_where_it_needs_no_graph():
    objective, batches = curve((0.0, 0.0))  # whose Gauss-Newton step overshoots in the exponent
    optimizer = dhf.HessianFree(objective, damping=1e-8)
    reports = [optimizer.step(batches) for _ in range(60)]
    rescued = [r for r in reports if r.fallback == "damping"]
    assert rescued
    assert all(r.reason is dhf.Reason.STEP_ACCEPTED and r.evaluations > 1 for r in rescued)
    assert rescued[0].damping > 1e-8  # what the accepted solve was made with
    assert reports[-1].loss_after < 1e-20


class Nested(dhf.LeastSquares):
    """``u' - cos x`` for a network u, its derivative by torch.autograd.grad, which vmap cannot enter."""

    def outputs(self, batch: Tensor) -> Tensor:
        with torch.enable_grad():
            x = batch.detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(self.module(x).sum(), x, create_graph=True)
        return (slope - x.cos()).squeeze(1)


def test_residuals_that_nest_autograd_are_solved_by_cgls_and_the_user_is_told_once():
    torch.manual_seed(0)
    objective = Nested(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double())
    batches = [torch.linspace(0, 3, 30, dtype=torch.float64).unsqueeze(1)]
    optimizer = dhf.HessianFree(objective)
    reports = [optimizer.step(batches) for _ in range(40)]
    told = [note for note in optimizer.notes if "cgls" in note]
    assert len(told) == 1
    assert "written with torch.func, direct would be faster" in told[0]
    assert reports[-1].loss_after < 1e-4 * reports[0].loss


def test_direct_asked_for_by_name_is_an_error_where_it_cannot_be():
    torch.manual_seed(0)
    objective = Nested(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double())
    with pytest.raises(dhf.UsageError, match="cannot be differentiated sample by sample"):
        dhf.HessianFree(objective, solver="direct").step([torch.ones(5, 1, dtype=torch.float64)])


def test_a_matrix_that_no_rank_can_hold_is_refused_and_what_one_costs_is_said(monkeypatch):
    objective, batches = curve((0.1, 0.0))
    with monkeypatch.context() as patch:
        patch.setattr("dhf.optim.hessian_free._TOO_LARGE", 1e-8)
        with pytest.raises(
            dhf.UsageError, match=r"2 x 2 matrix in parameter space, for which every rank needs .*use cg"
        ):
            dhf.HessianFree(objective, solver="direct").step(batches)
    optimizer = dhf.HessianFree(objective, solver="direct")
    optimizer.step(batches)
    assert "direct factorises a 2 x 2 matrix in parameter space: a step costs about 5 gradients" in optimizer.notes[-1]


def test_the_gradient_is_tried_after_three_failures_in_a_row(monkeypatch):
    search = Trial.search

    def only_downhill(self, iterates, damping, line_search="armijo"):
        """Fails for every direction but the gradient's own."""
        x, g = iterates[-1].x, self._point.gradient
        if torch.cosine_similarity(x, -g, dim=0) > 1 - 1e-12:
            return search(self, iterates, damping, line_search)
        return Tried(x, float(x.norm()), -1.0, 0.0, self._point.loss)

    monkeypatch.setattr(Trial, "search", only_downhill)
    x = torch.randn(20, 2, dtype=torch.float64) * torch.tensor([1.0, 5.0], dtype=torch.float64)
    objective = dhf.Objective(nn.Linear(2, 1, bias=False).double(), nn.MSELoss())
    optimizer = dhf.HessianFree(
        objective, solver="cg", globalisation="levenberg-marquardt", preconditioner="none", damping=1e-6
    )
    reports = [optimizer.step([(x, x.sum(1, keepdim=True))]) for _ in range(4)]
    assert [r.fallback for r in reports] == ["damping", "damping", "gradient", "damping"]
    assert [r.step_length > 0 for r in reports] == [False, False, True, False]
    assert reports[2].loss_after < reports[2].loss
