"""The networks that solve differential equations: derivatives, residuals, data, metric and picture."""

import math

import pytest
import torch

import dhf
from dhf.problems import build_problem
from dhf.problems.pinn import PointResiduals, TanhNetwork

f64 = torch.float64


@pytest.mark.parametrize("widths", [[5], [7, 4], [3, 6, 5]])
def test_forward_derivatives_are_those_of_autograd(widths):
    torch.manual_seed(0)
    network = TanhNetwork(widths).double()
    for p in network.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(6, 2, dtype=f64)
    u, slopes, laplacian = network.derivatives(x)
    torch.testing.assert_close(u, network(x))
    for i, point in enumerate(x):
        gradient = torch.autograd.functional.jacobian(lambda p: network(p.unsqueeze(0))[0], point)
        hessian = torch.autograd.functional.hessian(lambda p: network(p.unsqueeze(0))[0], point)
        torch.testing.assert_close(slopes[:, i], gradient, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(laplacian[i], hessian.trace(), rtol=1e-10, atol=1e-12)


class Exact(torch.nn.Module):
    """A network's stand-in that knows the solution, and its derivatives by autograd."""

    def __init__(self, u):
        super().__init__()
        self.u = u

    def derivatives(self, points):
        x = points.detach().requires_grad_(True)
        u = self.u(x)
        (slopes,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        second = [torch.autograd.grad(slopes[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2)]
        return u.detach(), slopes.detach().T, sum(second)


SOLUTIONS = {
    "poisson-pinn": ({"frequency": 2}, lambda x: torch.sin(2 * math.pi * x[:, 0]) * torch.sin(2 * math.pi * x[:, 1])),
    "convection-pinn": ({"speed": 7.0}, lambda x: torch.sin(2 * math.pi * x[:, 0] - 7.0 * x[:, 1])),
}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_exact_solution_has_no_residual_and_the_metric_no_error(name):
    options, u = SOLUTIONS[name]
    problem = build_problem(name, options)
    objective = PointResiduals(Exact(u), problem.objective.equation)
    residuals = objective.outputs(problem.train)
    assert residuals.shape == problem.train[0].shape[:1]
    assert float(residuals.abs().max()) < 1e-10


def test_poisson_has_900_points_inside_and_124_on_the_boundary():
    points, weights, _, boundary = build_problem("poisson-pinn", {}).train
    assert (len(points), int(boundary.sum())) == (1024, 124)
    assert len(torch.unique(points, dim=0)) == 1024
    on_edge = ((points == 0) | (points == 1)).any(1)
    assert torch.equal(on_edge, boundary)
    assert weights[boundary].unique().tolist() == [100.0]
    assert weights[~boundary].unique().tolist() == [1.0]
    assert points.dtype is f64


def test_data_of_convection_are_given_at_the_start_and_the_inflow():
    points, _, values, boundary = build_problem("convection-pinn", {"points": 5}).train
    assert (len(points), int(boundary.sum())) == (45, 20)
    assert ((points[boundary] == 0).any(1)).all()
    truth = torch.sin(2 * math.pi * points[:, 0] - 30.0 * points[:, 1])
    torch.testing.assert_close(values[boundary], truth[boundary])
    assert not values[~boundary].any()


def test_the_metric_is_the_relative_error_on_a_grid():
    torch.manual_seed(0)
    problem = build_problem("poisson-pinn", {})
    module = problem.objective.module.double()
    t = torch.arange(101, dtype=f64) / 100
    grid = torch.cartesian_prod(t, t)
    truth = torch.sin(math.pi * grid[:, 0]) * torch.sin(math.pi * grid[:, 1])
    with torch.no_grad():
        expected = float((module(grid) - truth).norm() / truth.norm())
    assert problem.metrics(module)["relative_l2_error"] == pytest.approx(expected, rel=1e-12)


def test_default_settings_solve_poisson_to_three_digits():
    torch.manual_seed(0)
    problem = build_problem("poisson-pinn", {"widths": [24], "points": 12})
    objective = problem.objective
    objective.module.double()
    optimizer = dhf.HessianFree(objective)
    for _ in range(150):
        optimizer.step([problem.train])
    assert problem.metrics(objective.module)["relative_l2_error"] < 1e-3
    assert any("direct" in note for note in optimizer.notes)


def test_solution_and_error_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    problem = build_problem("convection-pinn", {"widths": [4], "points": 4})
    (path,) = problem.pictures(problem.objective.module.double(), tmp_path)
    assert path.name == "solution.png"
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("poisson-pinn", {"widths": 64}, r"widths must be a list of hidden units such as \[50,50,50\], got 64"),
        ("poisson-pinn", {"widths": [64, 0]}, "widths must be a list"),
        ("poisson-pinn", {"points": 1}, "points must be a whole number and at least 2"),
        ("poisson-pinn", {"frequency": 1.5}, "frequency must be a whole number"),
        ("convection-pinn", {"speed": -1.0}, "speed must be a finite number"),
        ("convection-pinn", {"boundary_weight": 0.0}, "boundary_weight must be a finite number"),
    ],
)
def test_options_out_of_range_are_refused(name, options, text):
    with pytest.raises(dhf.UsageError, match=text):
        build_problem(name, options)
