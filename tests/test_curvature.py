"""Products of the Hessian, Gauss-Newton and Fisher matrices against dense float64 truths, in one process."""

from __future__ import annotations

import gc
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dhf
from dhf.curvature.fisher import uniforms
from dhf.operator import loss_and_gradient
from tests.models import (
    CLASSES,
    LOSSES,
    MODELS,
    dense,
    dense_gauss_newton,
    dense_hessian,
    dense_jacobian,
    flat,
    module_outputs,
    problem,
    relative_error,
    split,
)

CURVATURES = {"hessian": dhf.Hessian, "gauss_newton": dhf.GaussNewton, "fisher": dhf.Fisher}
WITH_LABELS = ["mse", "cross_entropy", "bce"]

grid = pytest.mark.parametrize(("model", "loss"), list(itertools.product(MODELS, LOSSES)))


# products against dense matrices


@grid
def test_hessian_is_the_dense_hessian(model: str, loss: str) -> None:
    objective, batch = problem(model, loss, weight_decay=0.3)
    truth = dense_hessian(objective.module, batch, LOSSES[loss][1], decay=0.3)
    with dhf.Hessian(objective, [batch]) as A:
        assert relative_error(dense(A), truth) < 1e-9


@grid
def test_gauss_newton_is_jacobian_times_output_hessian_times_jacobian(model: str, loss: str) -> None:
    objective, batch = problem(model, loss, weight_decay=0.3)
    truth = dense_gauss_newton(objective.module, batch, LOSSES[loss][1], decay=0.3)
    with dhf.GaussNewton(objective, [batch]) as A:
        assert relative_error(dense(A), truth) < 1e-9


@grid
def test_loss_and_gradient_are_those_of_the_objective(model: str, loss: str) -> None:
    objective, batch = problem(model, loss, weight_decay=0.3)
    tensors = list(objective.module.parameters())
    truth = LOSSES[loss][1](objective.module(batch[0]), batch[1]) + 0.15 * sum(p.square().sum() for p in tensors)
    gradient = flat(torch.autograd.grad(truth, tensors))
    for curvature in (dhf.Hessian, dhf.GaussNewton):
        with curvature(objective, [batch]) as A:
            assert A.loss == pytest.approx(truth.item(), rel=1e-13)
            assert relative_error(A.gradient, gradient) < 1e-12
    plain_loss, plain_gradient = loss_and_gradient(objective, [batch])
    assert plain_loss == pytest.approx(truth.item(), rel=1e-13)
    assert relative_error(plain_gradient, gradient) < 1e-12


def test_least_squares_gauss_newton_is_the_mean_of_jacobian_squares() -> None:
    module, batch = problem("mlp")[0].module, problem("mlp")[1]
    objective = dhf.LeastSquares(module)
    J = dense_jacobian(module, batch[0])
    residuals = module_outputs(module, batch[0]).reshape(-1)
    with dhf.GaussNewton(objective, [batch]) as A:
        assert A.loss == pytest.approx(float(residuals @ residuals) / 14, rel=1e-13)
        assert relative_error(A.gradient, J.T @ residuals / 7) < 1e-12
        assert relative_error(dense(A), J.T @ J / 7) < 1e-12


# Fisher


def _drawn_labels(loss: str, z: Tensor, seed: int) -> Tensor:
    """The labels that the operator draws, by its own uniform numbers and the inverse distribution function."""
    numbers = uniforms(seed, 0, len(z), 1 if loss == "cross_entropy" else CLASSES)
    if loss == "cross_entropy":
        cumulative = torch.softmax(z, 1).numpy().cumsum(1)
        return torch.tensor(
            [int(np.searchsorted(row, u)) for row, u in zip(cumulative, numbers[:, 0].numpy(), strict=True)]
        )
    if loss == "bce":
        return (numbers < torch.sigmoid(z)).double()
    # mean (z - y)² over k components is the negative logarithm of a normal density of variance k/2
    return z + np.sqrt(CLASSES / 2) * torch.distributions.Normal(0.0, 1.0).icdf(numbers)


# the binary cross-entropy is averaged over the k components of a sample: it is 1/k of the negative log-likelihood,
# and its Fisher matrix is k times the outer products of its gradients
_COMPONENTS = {"mse": 1, "bce": CLASSES, "cross_entropy": 1}


def _sample_gradients(module: nn.Module, inputs: Tensor, labels: Tensor, loss: str) -> Tensor:
    """∇ℓ of every sample with its label, shape (N, n)."""
    rows = []
    for i in range(len(inputs)):
        value = LOSSES[loss][1](module(inputs[i : i + 1]), labels[i : i + 1])
        rows.append(flat(torch.autograd.grad(value, list(module.parameters()))))
    return torch.stack(rows)


@pytest.mark.parametrize("loss", WITH_LABELS)
@pytest.mark.parametrize("seed", [0, 11])
def test_fisher_is_the_sum_of_outer_products_for_the_drawn_labels(loss: str, seed: int) -> None:
    objective, (x, y) = problem("mlp", loss)
    labels = _drawn_labels(loss, module_outputs(objective.module, x), seed)
    g = _sample_gradients(objective.module, x, labels, loss)
    truth = _COMPONENTS[loss] * g.T @ g / len(x)
    with dhf.Fisher(objective, [(x, y)], seed=seed) as A:
        assert relative_error(dense(A), truth) < 1e-9


def _labels_and_probabilities(loss: str, z: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Every label a sample can have, given to all samples at once, with its probability for each."""
    if loss == "cross_entropy":
        for c in range(CLASSES):
            yield torch.full((len(z),), c), torch.softmax(z, 1)[:, c]
    else:
        for bits in itertools.product((0.0, 1.0), repeat=CLASSES):
            b = torch.tensor(bits, dtype=z.dtype).expand_as(z)
            yield b, (b * torch.sigmoid(z) + (1 - b) * torch.sigmoid(-z)).prod(1)


def _enumerated_fisher(module: nn.Module, x: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """The expected Fisher matrix, and the variance of its one-draw estimate, entry by entry."""
    z = module_outputs(module, x)
    mean = second = 0.0
    for labels, probability in _labels_and_probabilities(loss, z):
        g = _sample_gradients(module, x, labels, loss)
        outer = _COMPONENTS[loss] * torch.einsum("ia,ib->iab", g, g)
        mean = mean + probability[:, None, None] * outer
        second = second + probability[:, None, None] * outer**2
    return mean.mean(0), (second - mean**2).sum(0) / len(x) ** 2


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_expected_fisher_is_the_gauss_newton_matrix(loss: str) -> None:
    objective, batch = problem("mlp", loss)
    expected, _ = _enumerated_fisher(objective.module, batch[0], loss)
    assert relative_error(expected, dense_gauss_newton(objective.module, batch, LOSSES[loss][1])) < 1e-12
    with dhf.GaussNewton(objective, [batch]) as A:
        assert relative_error(dense(A), expected) < 1e-9


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_sampled_fisher_converges_to_its_expectation(loss: str) -> None:
    draws = 2000
    objective, batch = problem("mlp", loss, samples=4)
    expected, variance = _enumerated_fisher(objective.module, batch[0], loss)
    with dhf.Fisher(objective, [batch], samples=draws, seed=5) as A:
        error = dense(A) - expected
    standard_error = (variance / draws).sqrt()
    assert (error.abs() <= 5 * standard_error + 1e-12).all()
    # were the draws fewer or correlated, the errors would not be of this size
    assert 0.3 < (error / (standard_error + 1e-12))[standard_error > 1e-9].std() < 2.0


def test_sampled_fisher_of_squares_converges_to_gauss_newton() -> None:
    objective, batch = problem("mlp", "mse", samples=4)
    truth = dense_gauss_newton(objective.module, batch, LOSSES["mse"][1])
    with dhf.Fisher(objective, [batch], samples=4000, seed=2) as A:
        assert relative_error(dense(A), truth) < 0.1
    with dhf.Fisher(objective, [batch], samples=1, seed=2) as A:
        assert relative_error(dense(A), truth) > 0.1


def test_fisher_seed_names_the_labels() -> None:
    objective, batch = problem("mlp", "cross_entropy")
    v = torch.randn(43, dtype=torch.float64)

    def product(seed: int) -> Tensor:
        with dhf.Fisher(objective, [batch], seed=seed) as A:
            return A @ v

    assert torch.equal(product(1), product(1))
    assert not torch.allclose(product(1), product(2))


@pytest.mark.parametrize("sizes", [[7], [3, 4], [1, 5, 1]])
def test_fisher_draws_the_same_labels_however_split(sizes: list[int]) -> None:
    objective, batch = problem("mlp", "bce")
    with (
        dhf.Fisher(objective, [batch], samples=3) as whole,
        dhf.Fisher(objective, split(batch, sizes), samples=3) as parts,
    ):
        assert relative_error(dense(parts), dense(whole)) < 1e-12


def test_fisher_draws_the_same_labels_beside_a_micro_batch_that_counts_nothing() -> None:
    objective, (x, y) = problem("mlp", "cross_entropy", samples=9)
    y[3:6] = -100
    with dhf.Fisher(objective, [(x, y)]) as whole, dhf.Fisher(objective, split((x, y), [3, 3, 3])) as parts:
        assert relative_error(dense(parts), dense(whole)) < 1e-12


def test_fisher_refuses_a_loss_without_labels() -> None:
    objective, batch = problem("mlp", "soft_margin")
    with pytest.raises(dhf.UsageError, match=r"predictive distribution.*Gauss-Newton"):
        dhf.Fisher(objective, [batch])
    weighted = dhf.Objective(objective.module, nn.CrossEntropyLoss(torch.ones(CLASSES).double()))
    with pytest.raises(dhf.UsageError, match="predictive distribution"):
        dhf.Fisher(weighted, [(batch[0], torch.zeros(7, dtype=torch.long))])
    with pytest.raises(ValueError, match="samples must be at least 1"):
        dhf.Fisher(objective, [batch], samples=0)


# properties


@pytest.fixture(scope="module", params=list(CURVATURES))
def operator(request: pytest.FixtureRequest) -> Iterator[dhf.GlobalOperator]:
    objective, batch = problem("mlp", "bce", weight_decay=0.1)
    with CURVATURES[request.param](objective, [batch]) as A:
        yield A


def _vectors(seed: int, number: int) -> Tensor:
    return torch.randn(number, 43, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 2**32))
def test_symmetric(operator: dhf.GlobalOperator, seed: int) -> None:
    u, v = _vectors(seed, 2)
    assert float(u @ (operator @ v)) == pytest.approx(float(v @ (operator @ u)), rel=1e-9, abs=1e-12)


@given(seed=st.integers(0, 2**32), a=st.floats(-1e3, 1e3), b=st.floats(-1e3, 1e3))
def test_linear(operator: dhf.GlobalOperator, seed: int, a: float, b: float) -> None:
    u, v = _vectors(seed, 2)
    sum_of_products = a * (operator @ u) + b * (operator @ v)
    torch.testing.assert_close(operator @ (a * u + b * v), sum_of_products, rtol=1e-9, atol=1e-9)


@given(seed=st.integers(0, 2**32), damping=st.floats(0, 1e3))
def test_shifted(operator: dhf.GlobalOperator, seed: int, damping: float) -> None:
    (v,) = _vectors(seed, 1)
    torch.testing.assert_close(operator.shifted(damping) @ v, operator @ v + damping * v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(operator.shifted(damping).shifted(1.0) @ v, operator @ v + (damping + 1) * v)


@given(seed=st.integers(0, 2**32))
def test_gauss_newton_is_positive_semidefinite(seed: int) -> None:
    objective, batch = problem("mlp", "soft_margin")
    (v,) = _vectors(seed, 1)
    with dhf.GaussNewton(objective, [batch]) as A:
        assert float(v @ (A @ v)) >= -1e-12


@given(order=st.permutations(range(7)), cuts=st.lists(st.integers(0, 7), max_size=3))
def test_order_and_micro_batches_do_not_matter(order: list[int], cuts: list[int]) -> None:
    objective, (x, y) = problem("mlp", "cross_entropy", weight_decay=0.1)
    edges = [0, *sorted(cuts), 7]
    sizes = [b - a for a, b in itertools.pairwise(edges)]
    shuffled = split((x[order], y[order]), sizes)
    (v,) = _vectors(3, 1)
    for curvature in (dhf.Hessian, dhf.GaussNewton):
        with curvature(objective, [(x, y)]) as whole, curvature(objective, shuffled) as parts:
            assert parts.count == 7
            assert parts.loss == pytest.approx(whole.loss, rel=1e-12)
            assert relative_error(parts.gradient, whole.gradient) < 1e-12
            assert relative_error(parts @ v, whole @ v) < 1e-12


# parameters of every kind


class Odd(nn.Module):
    """Frozen, tied, unused, purely linear and empty parameters together."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.unused = nn.Parameter(torch.randn(2))
        self.empty = nn.Parameter(torch.randn(0, 4))
        self.shift = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(self.frozen(x)))))
        return hidden + self.shift + self.empty.sum()


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_frozen_tied_unused_and_empty_parameters(curvature: str) -> None:
    module = Odd().double()
    batch = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    reference = {"hessian": dense_hessian, "gauss_newton": dense_gauss_newton}[curvature]
    truth = reference(module, batch, LOSSES["mse"][1])
    with CURVATURES[curvature](dhf.Objective(module, nn.MSELoss()), [batch]) as A:
        assert A.parameters.names == ("unused", "empty", "shift", "first.weight", "first.bias", "second.bias")
        assert A.shape == (2 + 0 + 3 + 9 + 3 + 3,) * 2
        assert relative_error(dense(A), truth) < 1e-9
        assert not (A @ torch.ones(20, dtype=torch.float64))[:2].any()  # unused comes first


def test_hessian_of_a_linear_function_is_zero() -> None:
    module = nn.Linear(3, 2).double()
    objective = dhf.Objective(module, lambda z, batch: z.mean())
    with dhf.Hessian(objective, [(torch.randn(4, 3, dtype=torch.float64), None)]) as A:
        assert not dense(A).any()


def test_float32_products_agree_with_float64() -> None:
    objective, (x, y) = problem("mlp", "bce")
    (v,) = _vectors(0, 1)
    with dhf.Hessian(objective, [(x, y)]) as A:
        truth = A @ v
    objective.module.float()
    with dhf.Hessian(objective, [(x.float(), y.float())]) as A:
        product = A @ v.float()
    assert product.dtype == torch.float32
    assert relative_error(product.double(), truth) < 1e-5


def test_product_refuses_vectors_that_do_not_fit() -> None:
    objective, batch = problem()
    with dhf.Hessian(objective, [batch]) as A:
        with pytest.raises(ValueError, match=r"shape \(43,\), got \(42,\)"):
            A @ torch.zeros(42, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"float64.*float32"):
            A @ torch.zeros(43)


# randomness and running statistics


class Masked(nn.Module):
    """An MLP with dropout that remembers the masks it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.dropout, self.second = nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES)
        self.masks: list[Tensor] = []
        self.dropout.register_forward_hook(lambda _, given, out: self.masks.append((out / given[0]).detach()))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(torch.tanh(self.first(x))))


class GivenMask(nn.Module):
    """The same MLP under one fixed mask."""

    def __init__(self, like: Masked, mask: Tensor) -> None:
        super().__init__()
        self.first, self.second, self.mask = like.first, like.second, mask

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)) * self.mask)


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_dropout_masks_are_fixed_for_an_operator(curvature: str) -> None:
    module = Masked().double()
    batch = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, CLASSES, dtype=torch.float64)
    state = torch.get_rng_state()
    with CURVATURES[curvature](dhf.Objective(module, nn.MSELoss()), [batch], seed=3) as A:
        assert torch.equal(torch.get_rng_state(), state)
        assert len(module.masks) == 1
        assert 0 < int((module.masks[0] == 0).sum()) < module.masks[0].numel()
        columns = dense(A)
        assert torch.equal(dense(A), columns)
    fixed = GivenMask(module, module.masks[0])
    reference = {"hessian": dense_hessian, "gauss_newton": dense_gauss_newton}[curvature]
    assert relative_error(columns, reference(fixed, batch, LOSSES["mse"][1])) < 1e-9
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_masks_follow_the_seed() -> None:
    module = Masked().double()
    batch = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, CLASSES, dtype=torch.float64)
    for seed in (1, 1, 2):
        dhf.Hessian(dhf.Objective(module, nn.MSELoss()), [batch, batch], seed=seed).close()
    first, other, again, other_again, changed, _ = module.masks
    assert torch.equal(first, again)
    assert torch.equal(other, other_again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, changed)


def _with_batchnorm() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    return module, (torch.randn(6, 4, dtype=torch.float64), torch.randn(6, CLASSES, dtype=torch.float64))


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_batchnorm_statistics_do_not_move(curvature: str) -> None:
    module, batch = _with_batchnorm()
    before = {name: b.clone() for name, b in module.named_buffers()}
    with (
        pytest.warns(UserWarning, match="submodule '1' is a BatchNorm1d in training mode"),
        CURVATURES[curvature](dhf.Objective(module, nn.MSELoss()), [batch]) as A,
    ):
        columns = dense(A)
    assert before.keys() == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name]), name
    reference = {"hessian": dense_hessian, "gauss_newton": dense_gauss_newton}[curvature]
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d):
            norm.track_running_stats = False  # the truth's forward passes need not move them either
    assert relative_error(columns, reference(module, batch, LOSSES["mse"][1])) < 1e-9


def test_batchnorm_statistics_move_when_asked() -> None:
    module, batch = _with_batchnorm()
    with pytest.warns(UserWarning, match="BatchNorm1d"):
        dhf.Hessian(dhf.Objective(module, nn.MSELoss()), [batch], move_buffers=True).close()
    assert int(module[1].num_batches_tracked) == 1
    hidden = module[0](batch[0]).detach()
    torch.testing.assert_close(module[1].running_mean, 0.1 * hidden.mean(0))


def test_batchnorm_in_evaluation_mode_does_not_warn() -> None:
    module, batch = _with_batchnorm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dhf.Hessian(dhf.Objective(module.eval(), nn.MSELoss()), [batch]).close()


# parameters that move under a graph


MOVES: dict[str, Callable[[Any], None]] = {
    "in place": lambda A: torch.no_grad()(lambda: A.parameters.tensors[1].add_(1.0))(),
    "through data": lambda A: A.parameters.tensors[1].data.add_(1.0),
    "new data": lambda A: setattr(A.parameters.tensors[1], "data", A.parameters.tensors[1].data.clone()),
    "written": lambda A: A.parameters.write(A.parameters.read() + 1.0),
    "from a vector": lambda A: nn.utils.vector_to_parameters(A.parameters.read() + 1.0, A.parameters.tensors),
    "by an optimizer": lambda A: _descend(A.parameters.tensors),
}


def _descend(tensors: Any) -> None:
    for p in tensors:
        p.grad = torch.ones_like(p)
    torch.optim.SGD(tensors, lr=1.0).step()


@pytest.mark.parametrize("curvature", list(CURVATURES))
@pytest.mark.parametrize("move", list(MOVES))
def test_product_after_a_move_is_refused(curvature: str, move: str) -> None:
    objective, batch = problem("mlp", "mse")
    name = "0.weight" if move in ("written", "from a vector", "by an optimizer") else "0.bias"
    with CURVATURES[curvature](objective, [batch]) as A:
        v = torch.ones(43, dtype=torch.float64)
        A @ v
        MOVES[move](A)
        with pytest.raises(dhf.StaleGraphError, match=f"parameter '{name}' changed"):
            A @ v


def test_product_of_a_closed_operator_is_refused() -> None:
    objective, batch = problem()
    with dhf.Hessian(objective, [batch]) as A:
        pass
    with pytest.raises(dhf.StaleGraphError, match="closed"):
        A @ torch.ones(43, dtype=torch.float64)
    A.close()
    assert A.gradient.shape == (43,)


# modules that cannot be used


@pytest.mark.filterwarnings("ignore:submodule '0' is a BatchNorm1d")
@pytest.mark.parametrize(
    ("child", "words"),
    [(nn.EmbeddingBag(4, 3), "use Embedding"), (nn.SyncBatchNorm(3), "use GroupNorm or LayerNorm")],
)
def test_modules_without_second_derivative_are_named(child: nn.Module, words: str) -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 3), child))
    with pytest.raises(dhf.UsageError, match=rf"submodule '1\.1' is an? {type(child).__name__}.*{words}"):
        dhf.Hessian(dhf.Objective(module, nn.MSELoss()), [])


def test_compiled_submodule_is_named() -> None:
    module = nn.Sequential(nn.Linear(3, 3), torch.compile(nn.Linear(3, 3)))
    with pytest.raises(dhf.UsageError, match=r"submodule '1'.*compiled"):
        dhf.Objective(module, nn.MSELoss())
    in_place = nn.Sequential(nn.Linear(3, 3))
    in_place[0].compile()
    with pytest.raises(dhf.UsageError, match=r"submodule '0'.*compiled"):
        dhf.Objective(in_place, nn.MSELoss())


class FullyShardedDataParallelStandIn(nn.Module):
    """Bears the name that dhf looks for."""


def test_fsdp_is_named() -> None:
    module = nn.Sequential(nn.Linear(3, 3), FullyShardedDataParallelStandIn())
    with pytest.raises(dhf.UsageError, match=r"submodule '1' is wrapped by FSDP.*before fully_shard"):
        dhf.Objective(module, nn.MSELoss())


def test_compiled_and_data_parallel_roots_are_unwrapped() -> None:
    module = nn.Linear(3, 3)
    assert dhf.Objective(torch.compile(module), nn.MSELoss()).module is module
    assert dhf.Objective(nn.DataParallel(module), nn.MSELoss()).module is module
    assert dhf.Objective(torch.compile(nn.DataParallel(module)), nn.MSELoss()).module is module


# losses and data that cannot be used


def _custom(loss: Callable[[Tensor, Any], Any]) -> tuple[dhf.Objective, Any]:
    objective, batch = problem("mlp", "mse")
    return dhf.Objective(objective.module, loss), batch


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
class TestUnusableLoss:
    def test_not_a_number_but_a_tensor(self, curvature: str) -> None:
        objective, batch = _custom(lambda z, batch: (z - batch[1]).square())
        with pytest.raises(dhf.UsageError, match=r"one number.*shape \(7, 3\); use loss.mean"):
            CURVATURES[curvature](objective, [batch])

    def test_python_float(self, curvature: str) -> None:
        objective, batch = _custom(lambda z, batch: 1.0)
        with pytest.raises(dhf.UsageError, match=r"one number.*float"):
            CURVATURES[curvature](objective, [batch])

    def test_independent_of_the_parameters(self, curvature: str) -> None:
        objective, batch = _custom(lambda z, batch: z.detach().square().mean())
        with pytest.raises(dhf.UsageError, match="does not depend on any trainable parameter"):
            CURVATURES[curvature](objective, [batch])

    def test_class_out_of_range(self, curvature: str) -> None:
        objective, (x, y) = problem("mlp", "cross_entropy")
        y[2] = CLASSES
        with pytest.raises(dhf.UsageError, match=r"target 3 of sample 2.*3 classes.*0 to 2"):
            CURVATURES[curvature](objective, [(x, y)])

    def test_binary_target_out_of_range(self, curvature: str) -> None:
        objective, (x, y) = problem("mlp", "bce")
        with pytest.raises(dhf.UsageError, match=r"targets in \[0, 1\], found 0 to 255"):
            CURVATURES[curvature](objective, [(x, 255 * (y > y.mean()).double())])

    @pytest.mark.parametrize("loss", ["mse", "bce"])
    def test_shapes_differ(self, curvature: str, loss: str) -> None:
        objective, (x, y) = problem("mlp", loss)
        with pytest.raises(dhf.UsageError, match=r"outputs have shape \(7, 3\) and targets \(7, 1\)"):
            CURVATURES[curvature](objective, [(x, y[:, :1])])

    def test_no_samples(self, curvature: str) -> None:
        objective, _ = problem()
        with pytest.raises(dhf.UsageError, match="no rank has a sample"):
            CURVATURES[curvature](objective, [])

    def test_nan_in_the_data(self, curvature: str) -> None:
        objective, (x, y) = problem()
        x[0, 0] = torch.nan
        with pytest.raises(dhf.NonFiniteError, match=r"loss is nan.*rank 0"):
            CURVATURES[curvature](objective, [(x, y)])


def test_detached_outputs_under_gauss_newton() -> None:
    class Detached(dhf.Objective):
        def outputs(self, batch: Any) -> Tensor:
            return super().outputs(batch).detach()

    objective, batch = problem()
    with pytest.raises(dhf.UsageError, match="outputs do not depend on any trainable parameter"):
        dhf.GaussNewton(Detached(objective.module, nn.MSELoss()), [batch])


def test_gauss_newton_refuses_a_loss_that_bypasses_the_outputs() -> None:
    objective, batch = problem()
    weight = objective.module[2].weight
    penalised = dhf.Objective(objective.module, lambda z, batch: F.mse_loss(z, batch[1]) + weight.square().sum())
    with pytest.raises(dhf.UsageError, match=r"parameter '2.weight' directly.*weight_decay"):
        dhf.GaussNewton(penalised, [batch])
    with dhf.Hessian(penalised, [batch]) as A:  # which has no such limit
        extra = torch.zeros(43, dtype=torch.float64)
        extra[25:40] = 2.0
        truth = dense_hessian(objective.module, batch, LOSSES["mse"][1]) + torch.diag(extra)
        assert relative_error(dense(A), truth) < 1e-9


# memory


class Watched(dhf.Objective):
    """Keeps weak references to the outputs of every forward pass."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: list[weakref.ref] = []

    def outputs(self, batch: Any) -> Tensor:
        z = super().outputs(batch) * 1.0
        self.seen.append(weakref.ref(z))
        return z


@pytest.mark.parametrize("curvature", list(CURVATURES))
def test_graphs_live_until_close_and_no_longer(curvature: str) -> None:
    objective, batch = problem()
    watched = Watched(objective.module, nn.MSELoss())
    gc.disable()
    try:
        A = CURVATURES[curvature](watched, [batch])
        assert watched.seen[0]() is not None
        A @ torch.ones(43, dtype=torch.float64)
        A.close()
        assert watched.seen[0]() is None  # with no help of the garbage collector
    finally:
        gc.enable()


@pytest.mark.parametrize("curvature", list(CURVATURES))
def test_fifty_builds_leave_no_tensor_behind(curvature: str) -> None:
    objective, batch = problem()

    def build() -> None:
        with CURVATURES[curvature](objective, [batch]) as A:
            A @ torch.ones(43, dtype=torch.float64)

    def tensors() -> int:
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    build()
    gc.collect()
    before = tensors()
    for _ in range(50):
        build()
    gc.collect()
    assert tensors() == before
    assert all(p.grad is None for p in objective.module.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("curvature", list(CURVATURES))
@pytest.mark.parametrize("model", ["mlp", "cnn", "gru", "encoder"])
def test_products_on_cuda_equal_those_on_cpu(curvature: str, model: str) -> None:
    objective, (x, y) = problem(model, "bce")
    with CURVATURES[curvature](objective, [(x, y)]) as A:
        v = torch.randn(A.shape[0], dtype=torch.float64)
        truth = A @ v
    objective.module.cuda()
    with CURVATURES[curvature](objective, [(x.cuda(), y.cuda())]) as A:
        assert relative_error((A @ v.cuda()).cpu(), truth) < 1e-9


def test_a_vector_that_is_not_finite_is_not_blamed_on_the_data() -> None:
    objective, batch = problem()
    with (
        dhf.Hessian(objective, [batch]) as A,
        pytest.raises(ValueError, match="the vector of the product holds NaN or infinity itself"),
    ):
        A @ torch.full((43,), float("nan"), dtype=torch.float64)


def test_a_product_that_overflows_is_not_blamed_on_a_vector_that_is_finite() -> None:
    objective, batch = problem()
    with (
        dhf.Hessian(objective, [batch]) as A,
        pytest.raises(dhf.NonFiniteError, match="the product holds NaN or infinity, from rank 0"),
    ):
        A @ torch.full((A.shape[0],), 1e308, dtype=torch.float64)
