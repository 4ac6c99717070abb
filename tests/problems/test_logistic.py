"""Logistic regression: conditioned as asked, its metric the gradient, its minimiser within Newton's reach."""

import numpy as np
import pytest
import torch

import dhf
from dhf.problems import build_problem

SMALL = {"samples": 400, "features": 12, "condition": 1e4}


def hessian(x: np.ndarray, theta: np.ndarray, weight_decay: float) -> np.ndarray:
    p = 1 / (1 + np.exp(-x @ theta))
    return (x * (p * (1 - p))[:, None]).T @ x / len(x) + weight_decay * np.eye(x.shape[1])


@pytest.mark.parametrize("condition", [1.0, 1e4, 1e8])
def test_the_hessian_at_zero_has_the_condition_asked_for(condition):
    x, y = build_problem("logistic", {**SMALL, "condition": condition}).train
    eigenvalues = np.linalg.eigvalsh(hessian(x.numpy(), np.zeros(12), 0.0))
    np.testing.assert_allclose(eigenvalues[::-1], 0.25 * np.geomspace(1, 1 / condition, 12), rtol=1e-5)
    assert set(y.view(-1).tolist()) == {0.0, 1.0}


def test_no_scaling_of_the_parameters_mends_it():
    x, _ = build_problem("logistic", {}).train
    matrix = hessian(x.numpy(), np.zeros(300), 1e-8)
    scale = np.sqrt(np.diag(matrix))
    assert np.linalg.cond(matrix) == pytest.approx(1e6, rel=0.04)
    assert np.linalg.cond(matrix / np.outer(scale, scale)) > 9e5


@pytest.mark.parametrize("weight_decay", [None, 0.3])
def test_the_metric_is_the_norm_of_autograds_gradient(weight_decay):
    problem = build_problem("logistic", {**SMALL, "weight_decay": 0.01})
    objective = problem.objective
    if weight_decay is not None:
        objective.weight_decay = weight_decay
    module = objective.module.double()
    torch.manual_seed(0)
    torch.nn.init.normal_(module.weight)
    penalty = 0.5 * objective.weight_decay * module.weight.square().sum()
    loss = objective.loss(objective.outputs(problem.train), problem.train) + penalty
    (gradient,) = torch.autograd.grad(loss, [module.weight])
    metrics = problem.metrics(module)
    assert metrics["gradient_norm_after"] == pytest.approx(float(gradient.norm()), rel=1e-12)
    x, y = (t.numpy() for t in problem.train)
    assert metrics["accuracy"] == np.mean((x @ module.weight.detach().numpy().T > 0) == y)


@pytest.mark.parametrize("weight_decay", [1e-8, 0.0])
def test_newton_reaches_the_minimiser_in_a_few_steps(weight_decay):
    problem = build_problem("logistic", {**SMALL, "condition": 1e6, "weight_decay": weight_decay})
    module = problem.objective.module.double()
    x, y = (t.numpy() for t in problem.train)
    assert not module.weight.any()
    for _ in range(10):
        theta = module.weight.detach().numpy()[0]
        p = 1 / (1 + np.exp(-x @ theta))
        gradient = x.T @ (p - y[:, 0]) / len(x) + weight_decay * theta
        theta = theta - np.linalg.solve(hessian(x, theta, weight_decay), gradient)
        module.weight.data.copy_(torch.from_numpy(theta))
    metrics = problem.metrics(module)
    assert metrics["gradient_norm_after"] < 1e-13
    assert 0.7 < metrics["accuracy"] < 0.9
    assert (x @ theta).std() == pytest.approx(2.0, rel=0.4)


def test_data_follow_the_seed_and_not_the_number_of_threads():
    options = {"samples": 3000, "features": 80}
    first = build_problem("logistic", options)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = build_problem("logistic", options)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first.train, again.train, strict=True))
    assert first.dtype == "float64"
    assert not torch.equal(build_problem("logistic", {**options, "seed": 1}).train[0], first.train[0])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"samples": 0}, "samples must be a whole number and at least 1, got 0"),
        ({"samples": 59}, "59 samples of 12 features may be separable.*--options.samples 60"),
        ({"features": 1}, "features must be a whole number and at least 2, got 1"),
        ({"features": 3.5}, "features must be a whole number"),
        ({"condition": 0.5}, "condition must be a finite number and at least 1, got 0.5"),
        ({"condition": float("inf")}, "condition must be a finite number"),
        ({"weight_decay": -1e-3}, "weight_decay must be a finite number and at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number"),
        ({"seed": -1}, "seed must be a whole number and at least 0, got -1"),
    ],
)
def test_options_are_checked(options, text):
    with pytest.raises(dhf.UsageError, match=text):
        build_problem("logistic", {**SMALL, **options})
