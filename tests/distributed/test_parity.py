"""N ranks train as one does: losses, CG iterations and parameters after five steps, in float64."""

import pytest
import torch
from torch import nn

import dhf
from tests.ranks import ranks

SPLITS = {
    "even": lambda n, size: [n // size] * (size - 1) + [n - n // size * (size - 1)],
    "uneven": lambda n, size: [1 + 2 * r for r in range(size - 1)] + [n - (size - 1) ** 2],
    "empty": lambda n, size: (
        [0] + ([n // (size - 1)] * (size - 2) + [n - n // (size - 1) * (size - 2)] if size > 1 else [n])
    ),
}
OPTIONS = [
    {"preset": "deep-net"},
    {"preset": "deep-net", "preconditioner": "none"},
    {"preset": "deep-net", "preconditioner": "jacobi"},
    {"preset": "deep-net", "preconditioner": "empirical-fisher"},
    {"preset": "deep-net", "preconditioner": "nystrom", "preconditioner_rank": 20},
    {"preset": "deep-net", "curvature": "fisher"},
    {"preset": "deep-net", "curvature_fraction": 0.4},
    {"preset": "newton"},
    {"curvature": "hessian", "solver": "minres"},
    {"curvature": "ggn", "solver": "direct"},
]
# with less damping, these systems let the rounding of their tenth iteration grow past what is asked for
LEAST_SQUARES = [{}, {"solver": "cgls", "damping": 1.0}, {"solver": "cgls", "preconditioner": "none", "damping": 1.0}]


def problem(loss: str) -> tuple[dhf.Objective, torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Sigmoid(), nn.Linear(4, 3)).double()
    x = torch.randn(36, 6, dtype=torch.float64)
    if loss == "cross-entropy":
        return dhf.Objective(module, nn.CrossEntropyLoss(), weight_decay=1e-3), x, torch.randint(0, 3, (36,))
    if loss == "least-squares":
        return dhf.Objective(module, nn.MSELoss(), weight_decay=1e-3), x, torch.rand(36, 3).double()
    return dhf.Objective(module, dhf.BinaryCrossEntropy("sum"), weight_decay=1e-3), x, torch.rand(36, 3).double()


def train(comm, split: str, micro: int | None, options: dict, loss: str) -> tuple[list, torch.Tensor, int]:
    """Five steps on this rank's part; losses, damping and CG iterations of each, the parameters, and the collectives."""
    objective, x, y = problem(loss)
    sizes = SPLITS[split](len(x), comm.size) if comm.size > 1 else [len(x)]
    first = sum(sizes[: comm.rank])
    mine = slice(first, first + sizes[comm.rank])
    pieces = x[mine].split(micro or len(x)), y[mine].split(micro or len(x))
    batches = [pair for pair in zip(*pieces, strict=True) if len(pair[0])]
    optimizer = dhf.HessianFree(objective, comm=comm, seed=11, **options)
    rows = []
    for _ in range(5):
        report = optimizer.step(batches)
        rows.append((report.loss, report.loss_after, report.damping, report.solve.iterations, report.solve.reason))
    return rows, torch.nn.utils.parameters_to_vector(objective.module.parameters()).detach(), comm.collectives


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("micro", [None, 4], ids=["whole", "micro-batches"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_train_as_one(size, split, micro, options):
    compare(size, split, micro, options, "bce")


@pytest.mark.parametrize("options", LEAST_SQUARES, ids=lambda o: "-".join(map(str, o.values())) or "defaults")
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_solve_least_squares_as_one(size, split, options):
    compare(size, split, 4, options, "least-squares")


def compare(size, split, micro, options, loss):
    """Losses, damping and iteration counts of ``size`` ranks against those of one, and the parameters."""
    truth, weights, _ = train(dhf.connect("serial"), "even", None, options, loss)
    results = ranks(size, train, split=split, micro=micro, options=options, loss=loss)
    for rows, parameters, _ in results:
        for found, expected in zip(rows, truth, strict=True):
            assert found[:3] == pytest.approx(expected[:3], rel=1e-9)
            assert found[3:] == expected[3:]
        torch.testing.assert_close(parameters, weights, rtol=1e-9, atol=1e-12)
        assert torch.equal(parameters, results[0][1])


def test_cross_entropy_trains_alike_too():
    truth, weights, _ = train(dhf.connect("serial"), "even", None, {}, "cross-entropy")
    for rows, parameters, _ in ranks(3, train, split="uneven", micro=5, options={}, loss="cross-entropy"):
        assert [r[1] for r in rows] == pytest.approx([r[1] for r in truth], rel=1e-9)
        torch.testing.assert_close(parameters, weights, rtol=1e-9, atol=1e-12)


def follow(comm, value: float) -> list:
    """A step in which rank 1 alone holds a value that is not a number."""
    objective, x, y = problem("bce")
    x = x.clone()
    x[comm.rank, 0] = value if comm.rank == 1 else 0.0
    before = torch.nn.utils.parameters_to_vector(objective.module.parameters()).detach().clone()
    try:
        dhf.HessianFree(objective, comm=comm).step([(x, y)])
    except dhf.NonFiniteError as error:
        after = torch.nn.utils.parameters_to_vector(objective.module.parameters())
        return [str(error), torch.equal(before, after)]
    return ["no error", False]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_data_on_one_rank_stop_all_and_name_it(value):
    for text, unchanged in ranks(3, follow, value=value):
        if value != value:
            assert "from rank 1" in text
            assert unchanged
        else:  # tanh of infinity is finite: the loss is, but not the gradient
            assert "from rank 1" in text


def stop_in_step(comm, stopped_rank: int) -> tuple:
    """A stop signal that reaches one rank after the first step."""
    from dhf.coordinator import Coordinator

    objective, x, y = problem("bce")
    state = {"stop": False}
    coordinator = Coordinator(comm, interrupted=lambda: state["stop"])
    optimizer = dhf.HessianFree(objective, coordinator=coordinator)
    optimizer.step([(x, y)])
    weights = torch.nn.utils.parameters_to_vector(objective.module.parameters()).detach().clone()
    damping = optimizer.damping
    state["stop"] = comm.rank == stopped_rank
    report = optimizer.step([(x, y)])
    after = torch.nn.utils.parameters_to_vector(objective.module.parameters())
    return report.reason, torch.equal(weights, after), damping == optimizer.damping, coordinator.stopping


@pytest.mark.parametrize("stopped_rank", [0, 2])
def test_a_step_that_is_interrupted_is_not_taken(stopped_rank):
    expected = (dhf.Reason.INTERRUPTED, True, True, dhf.Reason.INTERRUPTED)
    assert ranks(3, stop_in_step, stopped_rank=stopped_rank) == [expected] * 3


def average_statistics(comm) -> torch.Tensor:
    import warnings

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)).double()
    x = torch.arange(24.0, dtype=torch.float64).view(8, 3).sin()
    sizes = [3, 5]
    mine = x[: sizes[0]] if comm.rank == 0 else x[sizes[0] :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dhf.HessianFree(dhf.Objective(module, nn.MSELoss()), comm=comm).step([(mine, mine[:, :1])])
    return module[1].running_mean.clone()


def test_running_statistics_are_the_sample_weighted_mean_over_ranks():
    a, b = ranks(2, average_statistics)
    torch.manual_seed(0)
    hidden = nn.Linear(3, 2).double()(torch.arange(24.0, dtype=torch.float64).view(8, 3).sin()).detach()
    expected = 0.1 * hidden.mean(0)
    torch.testing.assert_close(a, expected)
    assert torch.equal(a, b)


def solve_with_a_fault(comm, where: str) -> tuple[str, str]:
    """CG whose preconditioner or callback fails on rank 1 in its third call."""
    objective, x, y = problem("bce")
    calls = 0

    def fault(*_):
        nonlocal calls
        calls += 1
        if comm.rank == 1 and calls == 3:
            raise OSError("the disk of this rank is full")

    def precondition(r):
        if where == "preconditioner":
            fault()
        return r

    with dhf.GaussNewton(objective, [(x, y)], comm=comm) as A:
        try:
            callback = fault if where == "callback" else None
            dhf.cg(A.shifted(1e-3), -A.gradient, preconditioner=precondition, callback=callback)
        except dhf.RankError as error:
            product = A @ torch.ones_like(A.gradient)  # the ranks are still in step
            return str(error), f"{float(product.sum()):.12g}"
    return "no error", ""


@pytest.mark.parametrize("where", ["preconditioner", "callback"])
def test_a_fault_between_products_reaches_all_ranks(where):
    outcomes = ranks(3, solve_with_a_fault, where=where)
    assert len(set(outcomes)) == 1
    assert "rank 1" in outcomes[0][0]
    assert "OSError: the disk of this rank is full" in outcomes[0][0]
