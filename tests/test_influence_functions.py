"""influence: closed forms on linear models, dense matrices on networks, and models that were trained again without a sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dhf
from tests.models import CLASSES, LOSSES, at_flat, dense_gauss_newton, dense_hessian, flat, problem, split, trainable


def dense_scores(
    objective: dhf.Objective, batch: Any, queries: list[Any], matrix: Tensor, loss: str, damping: float
) -> Tensor:
    """1/N ∇L_qᵀ (A + damping)⁻¹ ∇ℓ_i, each gradient by a backward pass of its own."""

    def gradient(part: Any) -> Tensor:
        theta = flat(trainable(objective.module).values()).requires_grad_(True)
        value = LOSSES[loss][1](at_flat(objective.module, part[0])(theta), part[1])
        return torch.autograd.grad(value, theta)[0]

    samples = torch.stack([gradient(part) for part in split(batch, [1] * len(batch[1]))])
    damped = matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)
    return torch.stack([gradient(q) for q in queries]) @ torch.linalg.solve(damped, samples.T) / len(samples)


def held_out(loss: str, count: int = 3) -> list[Any]:
    """Queries of one, two and one samples."""
    _, batch = problem("mlp", loss, samples=4, seed=9)
    return split(batch, [1, 2, 1])[:count]


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("loss", list(LOSSES))
def test_scores_are_those_of_the_dense_matrix(loss: str, curvature: str, decay: float) -> None:
    objective, batch = problem("mlp", loss, samples=9, weight_decay=decay)
    dense = {"ggn": dense_gauss_newton, "hessian": dense_hessian}[curvature]
    matrix = dense(objective.module, batch, LOSSES[loss][1], decay)
    queries = held_out(loss)
    found = dhf.influence(objective, split(batch, [5, 4]), queries, curvature=curvature, damping=0.3, rtol=1e-11)
    assert found.converged
    assert found.scores.shape == (3, 9)
    truth = dense_scores(objective, batch, queries, matrix, loss, 0.3)
    torch.testing.assert_close(found.scores, truth, rtol=1e-7, atol=1e-9 * float(truth.abs().max()))
    assert all(
        s.true_residual_norm <= 1e-10 * float(g.norm()) for s, g in zip(found.solutions, found.gradients, strict=True)
    )


def linear(samples: int = 12, width: int = 3) -> tuple[Tensor, Tensor]:
    """Data of a linear model with noise."""
    generator = torch.Generator().manual_seed(4)
    X = torch.randn(samples, width, dtype=torch.float64, generator=generator)
    return X, X.sum(1, keepdim=True) + 0.3 * torch.randn(samples, 1, dtype=torch.float64, generator=generator)


def fitted(X: Tensor, y: Tensor) -> nn.Linear:
    """The least-squares solution."""
    module = nn.Linear(X.shape[1], 1, bias=False).double()
    module.weight.data = torch.linalg.lstsq(X, y).solution.T.contiguous()
    return module


def test_linear_least_squares_against_its_closed_form() -> None:
    X, y = linear()
    module = fitted(X, y)
    x, t = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64), torch.tensor([[0.3]], dtype=torch.float64)
    objective = dhf.Objective(module, nn.MSELoss())
    found = dhf.influence(objective, [(X, y)], [(x, t)], damping=0.0, rtol=1e-13)
    # θ(without i) - θ = -(XᵀX)⁻¹ x_i e_i / (1 - h_i) exactly, of which the score is the part of first order in 1/N
    e = y - module(X).detach()
    move = -torch.linalg.solve(X.T @ X, X.T) * e.T
    slope = 2 * (module(x).detach() - t) * x
    torch.testing.assert_close(found.scores, slope @ move, rtol=1e-10, atol=1e-12)
    leverage = (X @ torch.linalg.inv(X.T @ X) * X).sum(1)
    for i in range(len(X)):
        keep = torch.arange(len(X)) != i
        retrained = fitted(X[keep], y[keep]).weight - module.weight
        exact = float(slope @ retrained.detach().T)
        assert float(found.scores[0, i]) / float(1 - leverage[i]) == pytest.approx(exact, rel=1e-8)


def test_logistic_regression_trained_again_without_a_sample() -> None:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(200, 3, dtype=torch.float64, generator=generator)
    y = (torch.rand(200, 1, dtype=torch.float64, generator=generator) < torch.sigmoid(X.sum(1, keepdim=True))).double()
    module = nn.Linear(3, 1).double()
    objective = dhf.Objective(module, nn.BCEWithLogitsLoss())

    def train(keep: Tensor) -> None:
        for _ in range(12):  # Newton's method
            with dhf.Hessian(objective, [(X[keep], y[keep])]) as A:
                step = dhf.cg(A, -A.gradient, rtol=1e-10)
            A.parameters.write(A.parameters.read() + step.x)

    train(torch.ones(200, dtype=torch.bool))
    query = X[:1] + 0.5, 1 - y[:1]
    found = dhf.influence(objective, [(X, y)], [query], curvature="hessian", damping=0.0, rtol=1e-12)
    before = float(objective.loss(module(query[0]), query).detach())
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    for i in (0, 7, 50):
        module.load_state_dict(kept)
        train(torch.arange(200) != i)
        rise = float(objective.loss(module(query[0]), query).detach()) - before
        assert rise == pytest.approx(float(found.scores[0, i]), rel=0.1, abs=1e-6)


def test_one_layer_alone() -> None:
    objective, batch = problem("mlp", "cross_entropy", samples=9)
    queries = held_out("cross_entropy")
    found = dhf.influence(objective, [batch], queries, parameters="2", damping=0.3, rtol=1e-11)
    inner = dhf.Objective(objective.module[2], nn.CrossEntropyLoss())
    with torch.no_grad():
        hidden, asked = [[(objective.module[:2](x), y) for x, y in part] for part in ([batch], queries)]
    alone = dhf.influence(inner, hidden, asked, damping=0.3, rtol=1e-11)
    torch.testing.assert_close(found.scores, alone.scores, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("model", ["cnn", "gru", "attention", "layernorm", "embedding"])
def test_other_modules(model: str) -> None:
    objective, batch = problem(model, "cross_entropy", samples=6)
    queries = split(batch, [2, 4])
    matrix = dense_gauss_newton(objective.module, batch, LOSSES["cross_entropy"][1])
    found = dhf.influence(objective, [batch], queries, damping=0.5, rtol=1e-11)
    truth = dense_scores(objective, batch, queries, matrix, "cross_entropy", 0.5)
    torch.testing.assert_close(found.scores, truth, rtol=1e-7, atol=1e-9 * float(truth.abs().max()))


def test_samples_that_count_nothing_have_no_influence() -> None:
    objective, (x, y) = problem("mlp", "cross_entropy", samples=6)
    ignored = y.clone()
    ignored[2:4] = -100
    queries = held_out("cross_entropy", 1)
    found = dhf.influence(objective, [(x[:2], ignored[:2]), (x[2:4], ignored[2:4]), (x[4:], ignored[4:])], queries)
    keep = [0, 1, 4, 5]
    without = dhf.influence(objective, [(x[keep], y[keep])], queries)
    assert not found.scores[:, 2:4].any()
    torch.testing.assert_close(found.scores[:, keep], without.scores, rtol=1e-6, atol=1e-12)


def test_a_preconditioner_and_a_solver_of_ones_own() -> None:
    objective, batch = problem("mlp", "cross_entropy", samples=9)
    queries, settings = held_out("cross_entropy"), {"damping": 0.01, "rtol": 1e-9}
    plain = dhf.influence(objective, [batch], queries, **settings)
    for more in ({"preconditioner": dhf.Nystrom(rank=20)}, {"solver": dhf.minres}):
        other = dhf.influence(objective, [batch], queries, **settings, **more)
        torch.testing.assert_close(other.scores, plain.scores, rtol=1e-5, atol=1e-8)
    faster = dhf.influence(objective, [batch], queries, **settings, preconditioner=dhf.Nystrom(rank=43))
    assert sum(s.iterations for s in faster.solutions) < sum(s.iterations for s in plain.solutions)


def test_a_solve_that_does_not_converge_says_so() -> None:
    objective, batch = problem("mlp", "cross_entropy", samples=9)
    found = dhf.influence(objective, [batch], held_out("cross_entropy"), damping=1e-6, max_iterations=2)
    assert not found.converged
    assert {s.reason for s in found.solutions} == {dhf.Reason.ITERATION_LIMIT}
    assert all(s.true_residual_norm > 0 for s in found.solutions)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"curvature": "fisher"}, "choose from ggn, hessian"),
        ({"queries": []}, "there is no query"),
        ({"damping": -1.0}, "damping must be finite and not negative"),
        ({"queries": [(torch.ones(1, 4).double(), torch.full((1,), CLASSES))]}, "class"),
    ],
)
def test_what_cannot_be_used_is_named(options: dict[str, Any], words: str) -> None:
    objective, batch = problem("mlp", "cross_entropy")
    with pytest.raises(ValueError, match=words):
        dhf.influence(objective, [batch], **{"queries": [batch], **options})


def test_what_queries_raise_comes_through() -> None:
    objective, batch = problem("mlp", "mse")

    def queries() -> Any:
        yield batch
        raise LookupError("no such file")

    with pytest.raises(LookupError, match="no such file"):
        dhf.influence(objective, [batch], queries())
