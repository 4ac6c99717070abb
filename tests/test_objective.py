"""Objective and LeastSquares: outputs, losses, counts, batches of other forms, refusals."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dhf
from dhf.evaluation import evaluate, micro_batch_seeds
from dhf.objective import rows, select
from tests.models import LOSSES, dense, dense_gauss_newton, problem, relative_error

Pair = namedtuple("Pair", "inputs targets")


def test_mean_loss_and_count() -> None:
    objective, (x, y) = problem("mlp", "mse")
    z = objective.outputs((x, y))
    assert torch.equal(z, objective.module(x))
    assert objective.loss(z, (x, y)) == nn.functional.mse_loss(z, y)
    assert objective.count((x, y)) == 7


def test_a_callable_is_given_the_whole_batch() -> None:
    seen: list[Any] = []

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        seen.append(batch)
        return outputs.square().mean()

    objective = dhf.Objective(nn.Linear(2, 1), loss)
    batch = (torch.ones(3, 2), "anything")
    objective.loss(objective.outputs(batch), batch)
    assert seen == [batch]
    assert objective.count(batch) == 3
    assert objective.known_loss() is None


class FromMapping(dhf.Objective):
    """Batches that are dictionaries."""

    def outputs(self, batch: Any) -> Tensor:
        return self.module(batch["features"])

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.mse_loss(outputs, batch["labels"])


def test_a_subclass_with_batches_of_its_own_form() -> None:
    plain, (x, y) = problem("mlp", "mse")
    objective = FromMapping(plain.module)
    batch = {"features": x, "labels": y}
    assert objective.count(batch) == 7
    truth = dense_gauss_newton(plain.module, (x, y), LOSSES["mse"][1])
    with dhf.GaussNewton(objective, [batch]) as A:
        assert relative_error(dense(A), truth) < 1e-9


def test_an_overridden_loss_is_not_taken_for_the_known_one() -> None:
    class Scaled(dhf.Objective):
        def loss(self, outputs: Tensor, batch: Any) -> Tensor:
            return 3 * super().loss(outputs, batch)

    plain, batch = problem("mlp", "mse")
    truth = 3 * dense_gauss_newton(plain.module, batch, LOSSES["mse"][1])
    with dhf.GaussNewton(Scaled(plain.module, nn.MSELoss()), [batch]) as A:
        assert relative_error(dense(A), truth) < 1e-9
    with pytest.raises(dhf.UsageError, match="predictive distribution"):
        dhf.Fisher(Scaled(plain.module, nn.MSELoss()), [batch])


def test_an_overridden_count_weights_micro_batches() -> None:
    class Doubled(dhf.Objective):
        """The first feature tells how often a sample counts; it is the same within a micro-batch."""

        def count(self, batch: Any) -> float:
            return float(batch[0][0, 0]) * len(batch[0])

    module = nn.Linear(1, 1).double()
    one = torch.tensor([[1.0]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    two = torch.tensor([[2.0]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    objective = Doubled(module, nn.MSELoss())
    first, second = (module(b[0]).item() ** 2 for b in (one, two))
    with dhf.Hessian(objective, [one, two]) as A:
        assert A.count == 3
        assert A.loss == pytest.approx((first + 2 * second) / 3, rel=1e-14)


def test_least_squares_residuals_of_both_shapes() -> None:
    x = torch.randn(6, 3, dtype=torch.float64)
    module = nn.Linear(3, 1).double()

    class Flat(dhf.LeastSquares):
        def outputs(self, batch: Any) -> Tensor:
            return self.module(batch).squeeze(1)

    class Wide(dhf.LeastSquares):
        def outputs(self, batch: Any) -> Tensor:
            return self.module(batch)

    extended = torch.cat([x, torch.ones(6, 1, dtype=torch.float64)], 1)
    for kind in (Flat, Wide):
        with dhf.GaussNewton(kind(module), [x[:2], x[2:]]) as A:
            assert relative_error(dense(A), extended.T @ extended / 6) < 1e-12
            assert A.loss == pytest.approx(0.5 * module(x).square().mean().item(), rel=1e-13)


@pytest.mark.parametrize("shape", [(6, 1, 1), (5,), (12, 1)])
def test_least_squares_refuses_residuals_of_other_shapes(shape: tuple[int, ...]) -> None:
    class Wrong(dhf.LeastSquares):
        def outputs(self, batch: Any) -> Tensor:
            return self.module(batch).sum() * torch.ones(shape, dtype=torch.float64)

    with pytest.raises(dhf.UsageError, match=r"shape \(N,\) or \(N, k\) with N = 6 samples, got \("):
        dhf.GaussNewton(Wrong(nn.Linear(3, 1).double()), [torch.randn(6, 3, dtype=torch.float64)])


def test_outputs_must_be_one_tensor() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.linear(x), x

    with pytest.raises(dhf.UsageError, match=r"returned tuple, not one tensor; override Objective.outputs"):
        dhf.Hessian(dhf.Objective(Two(), nn.MSELoss()), [(torch.ones(1, 3), torch.ones(1, 2))])


def test_arguments_that_cannot_be_used() -> None:
    with pytest.raises(dhf.UsageError, match="needs a loss"):
        dhf.Objective(nn.Linear(1, 1))
    with pytest.raises(dhf.UsageError, match=r"needs a torch.nn.Module, got function"):
        dhf.Objective(lambda x: x, nn.MSELoss())  # type: ignore[arg-type]
    for decay in (-1.0, float("nan")):
        with pytest.raises(dhf.UsageError, match="weight_decay must not be negative"):
            dhf.Objective(nn.Linear(1, 1), nn.MSELoss(), weight_decay=decay)


# batches


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(4, 2),
        (torch.zeros(4, 2), torch.zeros(4)),
        [{"a": {"b": torch.zeros(4)}}, 3],
        {"name": "x", "data": torch.zeros(4)},
        Pair(torch.zeros(4, 1), torch.zeros(4)),
    ],
)
def test_rows_are_those_of_the_first_tensor(batch: Any) -> None:
    assert rows(batch) == 4


@pytest.mark.parametrize("batch", [(), "text", torch.tensor(1.0), {"a": 3}])
def test_rows_of_nothing(batch: Any) -> None:
    with pytest.raises(dhf.UsageError, match=r"override Objective.count"):
        rows(batch)


def test_select_takes_samples_of_every_tensor() -> None:
    index = torch.tensor([2, 0])
    x, y = torch.arange(6.0).view(3, 2), torch.tensor([10, 20, 30])
    chosen = select({"pair": Pair(x, y), "list": [y, 1.5], "shared": torch.zeros(2)}, index)
    assert torch.equal(chosen["pair"].inputs, x[index])
    assert isinstance(chosen["pair"], Pair)
    assert chosen["pair"].targets.tolist() == [30, 10]
    assert chosen["list"][0].tolist() == [30, 10]
    assert chosen["list"][1] == 1.5
    assert chosen["shared"].shape == (2,)
    assert select((x, y), slice(1, None))[1].tolist() == [20, 30]


class _Slopes(dhf.LeastSquares):
    """Residuals that hold a derivative, as of an ODE, written without a thought of gradients being off."""

    calls = 0

    def outputs(self, batch: Any) -> torch.Tensor:
        self.calls += 1
        x = batch[0].detach().requires_grad_(True)
        y = self.module(x)
        return torch.autograd.grad(y.sum(), x, create_graph=True)[0] + y


def test_residuals_that_take_derivatives_are_evaluated_without_ado() -> None:
    module = torch.nn.Sequential(
        torch.nn.Linear(1, 5), torch.nn.Tanh(), torch.nn.Dropout(0.3), torch.nn.Linear(5, 1)
    ).double()
    objective = _Slopes(module)
    x = torch.linspace(0, 1, 7, dtype=torch.float64).view(-1, 1)
    with dhf.GaussNewton(objective, [(x,)], seed=3) as A:  # under the same random numbers
        truth = A.loss
    device, seeds = torch.device("cpu"), micro_batch_seeds(3, 0, 1)
    for calls in (2, 1):  # the first time it is found out, then known
        objective.calls = 0
        total, count = evaluate(objective, device, [(x,)], seeds)
        assert objective.calls == calls
        assert total / count == pytest.approx(truth, rel=1e-12)
    report = dhf.HessianFree(objective, solver="cgls").step([(x,)])
    assert report.loss_after < report.loss
