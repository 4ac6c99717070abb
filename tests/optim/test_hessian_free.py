"""HessianFree in one process: against closed forms, and in what it does when a step fails."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import dhf
from dhf.coordinator import Coordinator


def regression(decay: float = 0.0) -> tuple[dhf.Objective, list]:
    x = torch.randn(30, 4, dtype=torch.float64)
    y = torch.randn(30, 2, dtype=torch.float64)
    return dhf.Objective(nn.Linear(4, 2).double(), nn.MSELoss(), weight_decay=decay), [
        (x[:11], y[:11]),
        (x[11:], y[11:]),
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "direct"},
        {"solver": "cgls"},
        {"solver": "cg"},
        {"curvature": "hessian", "solver": "cg"},
        {"curvature": "hessian", "solver": "minres"},
        {"curvature": "hessian", "radius": 100.0},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_one_step_solves_linear_least_squares(options):
    objective, batches = regression()
    report = dhf.HessianFree(objective, damping=1e-10, cg_rtol=1e-10, cg_forcing=False, **options).step(batches)
    x = torch.cat([x for x, _ in batches])
    y = torch.cat([y for _, y in batches])
    truth = torch.linalg.lstsq(torch.cat([x, torch.ones(30, 1, dtype=torch.float64)], 1), y).solution
    found = torch.cat([objective.module.weight.T, objective.module.bias[None]]).detach()
    torch.testing.assert_close(found, truth, rtol=1e-7, atol=1e-9)
    assert report.reason is dhf.Reason.STEP_ACCEPTED
    assert report.reduction_ratio == pytest.approx(1.0, abs=1e-6)


def test_weight_decay_gives_ridge_regression():
    objective, batches = regression(decay=0.3)
    dhf.HessianFree(objective, damping=1e-10).step(batches)
    x = torch.cat([x for x, _ in batches])
    y = torch.cat([y for _, y in batches])
    design = torch.cat([x, torch.ones(30, 1, dtype=torch.float64)], 1)
    # mean over 60 elements of (Xw - y)² + 0.15‖w‖²
    truth = torch.linalg.solve(design.T @ design / 30 + 0.3 * torch.eye(5, dtype=torch.float64), design.T @ y / 30)
    found = torch.cat([objective.module.weight.T, objective.module.bias[None]]).detach()
    torch.testing.assert_close(found, truth, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("curvature", ["ggn", "hessian", "fisher"])
@pytest.mark.parametrize("preconditioner", ["none", "jacobi"])
def test_the_loss_falls_monotonically_to_a_stationary_point(curvature, preconditioner):
    x = torch.randn(40, 3, dtype=torch.float64)
    y = (x[:, 0] * x[:, 1] > 0).long()
    module = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    objective = dhf.Objective(module, nn.CrossEntropyLoss(), weight_decay=1e-2)
    optimizer = dhf.HessianFree(objective, curvature=curvature, preconditioner=preconditioner, seed=3)
    reports = [optimizer.step([(x, y)]) for _ in range(60)]
    for before, after in itertools.pairwise(reports):
        assert after.loss == pytest.approx(before.loss_after, rel=1e-12)
        # near the minimum a step that is all rounding may raise the loss by rounding
        assert after.loss_after <= after.loss * (1 + 1e-14)
    # sampled labels make the Fisher matrix a rougher model
    assert reports[-1].gradient_norm < (3e-2 if curvature == "fisher" else 1e-2) * reports[0].gradient_norm


@pytest.mark.parametrize("solver", ["cg", "steihaug"])
def test_a_saddle_point_is_left_along_negative_curvature(solver):
    class Saddle(dhf.Objective):
        def outputs(self, batch: Tensor) -> Tensor:
            return self.module.weight.expand(len(batch), 2)

        def loss(self, outputs: Tensor, batch: Tensor) -> Tensor:
            a, b = outputs[:, 0], outputs[:, 1]
            return (a**2 - b**2 + 0.25 * b**4).mean()

    module = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 1e-3]]))
    optimizer = dhf.HessianFree(Saddle(module), curvature="hessian", damping=1e-3, solver=solver)
    reports = [optimizer.step([torch.zeros(2, dtype=torch.float64)]) for _ in range(40)]
    assert any(r.solve.direction is not None for r in reports)
    assert reports[-1].loss_after == pytest.approx(-1.0, abs=1e-6)


class _Uphill(torch.autograd.Function):
    """The identity with the sign of its gradient wrong, so that every direction found goes uphill."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -g


class Uphill(dhf.Objective):
    def outputs(self, batch):
        return _Uphill.apply(self.module(batch[0]))


def test_a_step_without_decrease_changes_nothing_but_the_damping():
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)
    objective = Uphill(nn.Linear(3, 1).double(), nn.MSELoss())
    optimizer = dhf.HessianFree(objective, damping=2.0)
    before = [p.detach().clone() for p in objective.module.parameters()]
    report = optimizer.step([(x, y)])
    assert report.reason is dhf.Reason.NO_DECREASE
    assert (report.step_length, report.damping) == (0.0, 2.0)
    assert report.loss_after == report.loss
    assert optimizer.damping > 2.0
    for p, value in zip(objective.module.parameters(), before, strict=True):
        assert torch.equal(p, value)


def test_a_stationary_point_is_reported():
    objective = dhf.Objective(nn.Linear(2, 1).double(), nn.MSELoss())
    x = torch.randn(5, 2, dtype=torch.float64)
    y = objective.module(x).detach()
    report = dhf.HessianFree(objective).step([(x, y)])
    assert report.reason is dhf.Reason.GRADIENT_ZERO
    assert report.solve is None


def test_a_failed_evaluation_leaves_the_parameters_where_they_were():
    class Fragile(dhf.Objective):
        def outputs(self, batch):
            if not torch.is_grad_enabled():
                raise OSError("disk went away")
            return super().outputs(batch)

    objective = Fragile(nn.Linear(2, 1).double(), nn.MSELoss())
    before = [p.detach().clone() for p in objective.module.parameters()]
    with pytest.raises(OSError, match="disk went away"):
        dhf.HessianFree(objective).step([(torch.randn(5, 2).double(), torch.randn(5, 1).double())])
    for p, value in zip(objective.module.parameters(), before, strict=True):
        assert torch.equal(p, value)


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "deep-net", "curvature_fraction": 0.5, "preconditioner_refresh": 2},
        {"preset": "deep-net", "preconditioner": "jacobi", "warm_start_decay": 0.9},
        {"preset": "deep-net", "preconditioner": "nystrom", "preconditioner_rank": 5},
        {"preset": "newton"},
        {"preset": "newton", "preconditioner": "kfac"},
        {"preset": "least-squares", "solver": "cg"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_resumed_run_is_bitwise_the_run_that_was_not_stopped(options):
    def start():
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 2)).double()
        x, y = torch.randn(20, 3, dtype=torch.float64), torch.randint(0, 2, (20,))
        objective = dhf.Objective(module, nn.CrossEntropyLoss())
        return module, dhf.HessianFree(objective, **options), [(x, y)]

    module, optimizer, batches = start()
    for _ in range(3):
        optimizer.step(batches)
    weights, state = {k: v.clone() for k, v in module.state_dict().items()}, optimizer.state_dict()
    whole = [optimizer.step(batches).loss_after for _ in range(3)]
    module, resumed, batches = start()
    module.load_state_dict(weights)
    resumed.load_state_dict(state)
    assert [resumed.step(batches).loss_after for _ in range(3)] == whole


@pytest.mark.parametrize("options", [{"preset": "deep-net"}, {"preset": "newton", "preconditioner": "nystrom"}])
def test_a_step_that_was_interrupted_is_taken_again_as_if_nothing_had_been(options):
    def run(interrupt_at: int | None) -> list[float]:
        torch.manual_seed(1)
        module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        x, y = torch.randn(20, 3, dtype=torch.float64), torch.randint(0, 2, (20,))
        stop = [False]
        coordinator = Coordinator(dhf.connect("serial"), interrupted=lambda: stop[0])
        optimizer = dhf.HessianFree(dhf.Objective(module, nn.CrossEntropyLoss()), coordinator=coordinator, **options)
        losses = []
        while len(losses) < 6:
            if len(losses) == interrupt_at:
                stop[0] = True
                assert optimizer.step([(x, y)]).reason is dhf.Reason.INTERRUPTED
                stop[0], coordinator.stopping, interrupt_at = False, None, None
            losses.append(optimizer.step([(x, y)]).loss_after)
        return losses

    assert run(interrupt_at=3) == run(interrupt_at=None)


def test_dropout_masks_are_the_same_at_every_trial_point():
    """With masks redrawn between graph and trial, actual and predicted decrease of a tiny step would have nothing in common."""
    module = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    report = dhf.HessianFree(dhf.Objective(module, nn.MSELoss()), damping=1e4).step([(x, y)])
    assert report.reduction_ratio == pytest.approx(1.0, abs=1e-2)


def test_running_statistics_move_once_a_step():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    hidden = module[0](x).detach()
    expected = 0.1 * hidden.mean(0)
    with pytest.warns(UserWarning, match="'1' is a BatchNorm1d in training mode"):
        report = dhf.HessianFree(dhf.Objective(module, nn.MSELoss())).step([(x, y)])
    assert report.evaluations >= 1
    torch.testing.assert_close(module[1].running_mean, expected)
    assert int(module[1].num_batches_tracked) == 1


def test_a_preconditioner_of_the_users_own_is_used():
    seen = []

    def exact(operator, damping):
        n = operator.shape[0]
        dense = torch.stack([operator @ e for e in torch.eye(n, dtype=torch.float64)])
        inverse = torch.linalg.inv(dense + damping * torch.eye(n, dtype=torch.float64))
        seen.append(damping)
        return lambda r: inverse @ r

    objective, batches = regression()
    report = dhf.HessianFree(objective, preconditioner=exact, damping=0.5).step(batches)
    assert seen == [0.5]
    assert report.solve.iterations == 1


def test_the_diagonal_preconditioner_is_the_diagonal():
    objective, batches = regression()
    with dhf.GaussNewton(objective, batches) as A:
        n = A.shape[0]
        dense = torch.stack([A @ e for e in torch.eye(n, dtype=torch.float64)])
        scale = dhf.jacobi(A, 0.1, probes=4000, exponent=1.0)(torch.ones(n, dtype=torch.float64))
    torch.testing.assert_close(scale, 1 / (dense.diagonal() + 0.1), rtol=0.2, atol=0.05)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"curvature": "newton"}, "curvature 'newton' is unknown; choose from ggn, hessian, fisher"),
        ({"preconditioner": "ilu"}, "preconditioner 'ilu' is unknown"),
        ({"solver": "gmres"}, "solver 'gmres' is unknown"),
        ({"damping": 0.0}, "damping must be positive"),
        ({"curvature_fraction": 1.5}, "curvature_fraction must be in"),
        ({"warm_start_decay": -0.1}, "warm_start_decay must be in"),
        ({"cg_max_iterations": 0}, "cg_max_iterations must be at least 1"),
        ({"damping": math.nan}, "damping must be positive and finite"),
        ({"damping_factor": 1.0}, "damping_factor must be above 1"),
        ({"preconditioner_rank": 0}, "preconditioner_rank must be at least 1"),
        ({"cg_rtol": 1.0}, "cg_rtol must be in"),
        ({"radius": 0.0}, "radius must be positive"),
        (
            {"preset": "convexx"},
            "preset 'convexx' is unknown; choose from auto, deep-net, least-squares, newton, convex",
        ),
        ({"solver": "steihaug", "globalisation": "nielsen"}, "a trust region and the solver steihaug go together"),
        ({"globalisation": "trust-region"}, "a trust region and the solver steihaug go together"),
        ({"solver": "direct", "curvature": "fisher"}, "direct works on the Gauss-Newton matrix alone"),
        ({"solver": "cgls", "curvature_fraction": 0.5}, "cgls takes all samples"),
    ],
)
def test_arguments_out_of_range_are_refused(options, text):
    with pytest.raises(dhf.UsageError, match=text):
        dhf.HessianFree(regression()[0], **options)


def test_a_non_finite_loss_at_the_start_is_an_error():
    objective, [(x, y), _] = regression()
    before = objective.module.weight.detach().clone()
    with pytest.raises(dhf.NonFiniteError, match="from rank 0"):
        dhf.HessianFree(objective).step([(x, y * math.inf)])
    assert torch.equal(objective.module.weight, before)


def test_what_is_not_an_objective_or_not_a_list_of_micro_batches_is_refused():
    module = nn.Linear(2, 1)
    with pytest.raises(dhf.UsageError, match=r"expected a dhf.Objective, got generator"):
        dhf.HessianFree(module.parameters())
    objective = dhf.Objective(module, nn.MSELoss())
    batch = torch.ones(3, 2), torch.ones(3, 1)
    for wrong in (batch, list(batch)):
        with pytest.raises(dhf.UsageError, match=r"for one micro-batch give \[batch\]"):
            dhf.HessianFree(objective).step(wrong)
    with pytest.raises(dhf.UsageError, match=r"expected a dhf.Objective, got Linear"):
        dhf.GaussNewton(module, [batch])
