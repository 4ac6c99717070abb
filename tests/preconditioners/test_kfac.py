"""KFAC against dense Kronecker products in float64: blocks, diagonal, renewal, state, and what it tells its user."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dhf
from dhf.curvature.fisher import uniforms
from dhf.preconditioners import KFAC
from tests.models import CLASSES, LOSSES, MODELS, flat, module_outputs, problem, relative_error, split
from tests.preconditioners.dense import as_matrix, assert_positive_definite, vectors

pytestmark = pytest.mark.filterwarnings("ignore:K-FAC covers")
LABELLED = ["mse", "cross_entropy", "bce"]


def normed() -> nn.Module:
    """Two linear layers with a normalisation, which is not covered, between them."""
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


def objective_of(loss: str, weight_decay: float = 0.0) -> tuple[dhf.Objective, tuple[Tensor, Tensor]]:
    _, batch = problem("mlp", loss)
    return dhf.Objective(normed(), LOSSES[loss][0], weight_decay=weight_decay), batch


def dense_inverse(
    objective: dhf.Objective, batch: tuple[Tensor, Tensor], layers: dict[str, nn.Linear], mu: float, seed: int = 0
) -> Tensor:
    """The preconditioner's matrix: Kronecker blocks of these layers, used once per sample, and the diagonal of the rest."""
    (x, y), module, samples = batch, objective.module, len(batch[0])
    calls: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        layer.register_forward_hook(lambda _, a, z, name=name: calls.update({name: (a[0].detach(), z)}))
        for name, layer in layers.items()
    ]
    outputs = module(x)
    for hook in hooks:
        hook.remove()
    loss = objective.known_loss()
    z = outputs.detach()
    c = loss.sampled_gradients(z, y, uniforms(seed, 0, samples, loss.draws(z)))

    named = dict(module.named_parameters())
    gradient = torch.autograd.grad(outputs, list(named.values()), c / samples, retain_graph=True)
    squares = [samples * g.square() for g in gradient]
    M = torch.diag(torch.cat([(0.5 * s + 0.5 * s.mean()).reshape(-1) for s in squares]))
    places, first = {}, 0
    for name, p in named.items():
        places[name] = torch.arange(first, first + p.numel()).view(p.shape)
        first += p.numel()
    for name, layer in layers.items():
        a, z = calls[name]
        (g,) = torch.autograd.grad(outputs, z, c, retain_graph=True)
        index = places[f"{name}.weight"]
        if layer.bias is not None:
            a = torch.cat([a, torch.ones(samples, 1).double()], 1)
            index = torch.cat([index, places[f"{name}.bias"][:, None]], 1)
        index = index.flatten()
        # rows of the weight are contiguous, so that the factor of its outputs comes first
        M[index[:, None], index] = torch.kron(g.T @ g / samples, a.T @ a / samples)
    return torch.linalg.inv(M + mu * torch.eye(first).double())


# blocks


@pytest.mark.parametrize("loss", LABELLED)
@pytest.mark.parametrize("damping", [1e-4, 1.0])
def test_blocks_and_diagonal_are_those_of_the_dense_inverse(loss: str, damping: float) -> None:
    objective, batch = objective_of(loss)
    truth = dense_inverse(objective, batch, {"0": objective.module[0], "3": objective.module[3]}, damping)
    with dhf.GaussNewton(objective, split(batch, [3, 4])) as A:
        products = A.products
        precondition = KFAC()(A, damping)
        assert A.products == products
        assert relative_error(as_matrix(precondition, A.shape[0]), truth) < 1e-9


@pytest.mark.parametrize("damping", [0.0, 0.2])
def test_weight_decay_adds_to_the_damping(damping: float) -> None:
    objective, batch = objective_of("bce", weight_decay=0.05)
    truth = dense_inverse(objective, batch, {"0": objective.module[0], "3": objective.module[3]}, damping + 0.05)
    with dhf.GaussNewton(objective, [batch]) as A:
        assert relative_error(as_matrix(KFAC()(A, damping), A.shape[0]), truth) < 1e-9


def test_layers_without_and_with_frozen_bias() -> None:
    module = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    _, batch = problem("mlp", "mse")
    objective = dhf.Objective(module, nn.MSELoss())
    with dhf.GaussNewton(objective, [batch]) as A:
        found = as_matrix(KFAC()(A, 0.1), 38)
        assert relative_error(found, dense_inverse(objective, batch, {"0": module[0], "2": module[2]}, 0.1)) < 1e-9
    module[2].bias.requires_grad_(False)
    frozen = nn.Sequential(module[0], nn.Tanh(), nn.Linear(5, CLASSES, bias=False).double())
    frozen[2].weight = module[2].weight
    shifted = dhf.Objective(frozen, nn.MSELoss())  # z - y is the same without the bias of both
    true_batch = batch[0], batch[1] - module[2].bias.detach()
    with dhf.GaussNewton(objective, [batch]) as A:
        found = as_matrix(KFAC()(A, 0.1), 35)
        assert relative_error(found, dense_inverse(shifted, true_batch, {"0": frozen[0], "2": frozen[2]}, 0.1)) < 1e-9


def test_convolution_as_the_linear_layer_it_is_on_one_place() -> None:
    conv, linear = nn.Conv2d(2, 3, 2).double(), nn.Linear(8, 3).double()
    with torch.no_grad():
        linear.weight.copy_(conv.weight.flatten(1))
        linear.bias.copy_(conv.bias)
    x, y = torch.randn(6, 2, 2, 2, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    objective = dhf.Objective(nn.Sequential(linear), nn.MSELoss())
    truth = dense_inverse(objective, (x.flatten(1), y), {"0": linear}, 0.1)
    with dhf.GaussNewton(dhf.Objective(nn.Sequential(conv, nn.Flatten()), nn.MSELoss()), [(x, y)]) as A:
        assert relative_error(as_matrix(KFAC()(A, 0.1), 27), truth) < 1e-9


def test_layers_that_never_run_take_the_diagonal() -> None:
    objective, batch = problem("attention", "cross_entropy")
    truth = dense_inverse(objective, batch, {"head": objective.module.head}, 0.01)
    with dhf.GaussNewton(objective, [batch]) as A, pytest.warns(UserWarning, match=r"attention\.out_proj\.weight"):
        assert relative_error(as_matrix(KFAC()(A, 0.01), A.shape[0]), truth) < 1e-9


def test_one_linear_layer_on_like_inputs_is_inverted_exactly() -> None:
    module = nn.Sequential(nn.Linear(4, CLASSES)).double()
    x = torch.randn(1, 4, dtype=torch.float64).expand(9, 4).contiguous()
    objective = dhf.Objective(module, nn.CrossEntropyLoss())
    with dhf.Fisher(objective, [(x, torch.zeros(9, dtype=torch.long))], seed=3) as A:
        precondition = KFAC(seed=3)(A, 0.1)
        for r in vectors(15, 4).T:
            torch.testing.assert_close(precondition(A.shifted(0.1) @ r), r, rtol=1e-9, atol=1e-12)


def test_float32() -> None:
    objective, (x, y) = objective_of("bce")
    truth = dense_inverse(objective, (x, y), {"0": objective.module[0], "3": objective.module[3]}, 0.1)
    objective.module.float()
    with dhf.GaussNewton(objective, [(x.float(), y.float())]) as A:
        found = as_matrix(KFAC()(A, 0.1), A.shape[0], torch.float32)
    assert found.dtype == torch.float32
    assert relative_error(found.double(), truth) < 1e-4


@pytest.mark.parametrize(("model", "loss"), [(m, "cross_entropy") for m in MODELS] + [("mlp", loss) for loss in LOSSES])
@pytest.mark.parametrize("damping", [1e-3, 10.0])
def test_positive_definite(model: str, loss: str, damping: float) -> None:
    objective, batch = problem(model, loss)
    with dhf.GaussNewton(objective, [batch]) as A:
        assert_positive_definite(KFAC()(A, damping), A.shape[0])


class TiedBias(nn.Sequential):
    """Layers of one bias, or of one weight with a bias each."""

    def __init__(self, tied: str) -> None:
        super().__init__(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES))
        if tied == "bias":
            self[2].bias = self[0].bias
        else:
            self[2].weight = self[0].weight


@pytest.mark.parametrize("tied", ["bias", "weight"])
def test_positive_definite_where_parameters_are_tied(tied: str) -> None:
    objective = dhf.Objective(TiedBias(tied).double(), nn.MSELoss())
    _, batch = problem("mlp", "mse")
    with dhf.GaussNewton(objective, [batch]) as A:
        precondition = KFAC()(A, 1e-3)
        assert_positive_definite(precondition, A.shape[0])
        M = as_matrix(precondition, A.shape[0])
        assert torch.linalg.eigvalsh(0.5 * (M + M.T))[0] > 0
        assert relative_error(M, M.T) < 1e-12


# renewal and state


def moved(objective: dhf.Objective, seed: int) -> None:
    """Another point."""
    with torch.no_grad():
        for p in objective.module.parameters():
            p.copy_(torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(seed)) / 2)


def test_factors_are_kept_between_renewals_and_damping_is_not() -> None:
    objective, batch = objective_of("cross_entropy")
    layers = {"0": objective.module[0], "3": objective.module[3]}
    kfac = KFAC(refresh=2, seed=7)
    # every call has a point of its own; its damping, and the call whose factors it must use
    for call, (damping, used) in enumerate([(0.1, 0), (0.02, 0), (0.02, 2), (0.5, 2)]):
        moved(objective, used)
        truth = dense_inverse(objective, batch, layers, damping, seed=7 + used)
        moved(objective, call)
        with dhf.GaussNewton(objective, [batch]) as A:
            assert relative_error(as_matrix(kfac(A, damping), A.shape[0]), truth) < 1e-9


@pytest.mark.parametrize(("refresh", "renewed"), [(1, [1, 1, 1, 1]), (2, [1, 0, 1, 0]), (3, [1, 0, 0, 1])])
def test_a_renewal_is_one_collective(refresh: int, renewed: list[int]) -> None:
    objective, batch = objective_of("bce")
    kfac = KFAC(refresh=refresh)
    taken = []
    with dhf.GaussNewton(objective, [batch]) as A:
        for _ in range(4):
            before = A.comm.collectives
            kfac(A, 0.1)(A.gradient)
            taken.append(A.comm.collectives - before)
    assert taken == renewed


def test_renewed_for_another_number_of_layers() -> None:
    kfac = KFAC(refresh=100)
    for objective, batch in (problem("mlp", "bce"), problem("cnn", "bce"), problem("gru", "bce")):
        with dhf.GaussNewton(objective, [batch]) as A:
            assert_positive_definite(kfac(A, 0.1), A.shape[0])


@pytest.mark.parametrize("refresh", [1, 3])
@pytest.mark.parametrize("model", ["mlp", "attention"])
def test_state_goes_on_with_the_same_bits(model: str, refresh: int) -> None:
    objective, batch = problem(model, "bce")
    one = KFAC(refresh=refresh, seed=2)

    def next_z(kfac: KFAC, step: int) -> Tensor:
        with dhf.GaussNewton(objective, [batch]) as A:
            return kfac(A, 0.1 + step)(A.gradient)

    next_z(one, 0)
    next_z(one, 1)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other = KFAC(refresh=refresh, seed=2)
    other.load_state_dict(torch.load(file, weights_only=True))
    seen = []
    for step in range(5):
        moved(objective, step)
        seen.append(next_z(one, step))
        assert torch.equal(next_z(other, step), seen[-1])
    assert not torch.equal(seen[0], seen[1])


# words


def told(objective: dhf.Objective, batch: Any, kfac: KFAC) -> list[str]:
    with warnings.catch_warnings(record=True) as caught, dhf.GaussNewton(objective, [batch]) as A:
        warnings.simplefilter("always")
        kfac(A, 0.1)
        kfac(A, 0.1)
    return [str(w.message) for w in caught if "K-FAC" in str(w.message)]


def test_uncovered_parameters_are_named_once() -> None:
    objective, batch = objective_of("mse")
    kfac = KFAC(refresh=1)
    (words,) = told(objective, batch, kfac)
    assert "here 4 of 6 parameter tensors" in words
    assert words.endswith("the others take a diagonal: 1.weight, 1.bias")
    assert not told(objective, batch, kfac)


def test_many_uncovered_parameters_are_counted() -> None:
    objective, batch = problem("encoder", "mse")
    (words,) = told(objective, batch, KFAC())
    left = [n for n, _ in objective.module.named_parameters() if not n.startswith(("head", "layer.linear"))]
    assert words.endswith(f"{', '.join(left[:4])} and {len(left) - 4} more")


def test_nothing_is_said_where_all_is_covered() -> None:
    assert not told(*problem("mlp", "mse"), KFAC())
    assert not told(*problem("cnn", "mse"), KFAC())


@pytest.mark.parametrize("damping", [0.0, -1.0, math.nan])
def test_damping_out_of_range(damping: float) -> None:
    objective, batch = problem("mlp", "mse")
    with dhf.GaussNewton(objective, [batch]) as A, pytest.raises(ValueError, match=f"positive damping, got {damping}"):
        KFAC()(A, damping)


def test_refresh_out_of_range() -> None:
    with pytest.raises(ValueError, match="refresh must be at least 1, got 0"):
        KFAC(refresh=0)


def test_preconditioned_cg_takes_fewer_iterations() -> None:
    objective, (x, y) = problem("mlp", "cross_entropy", samples=200)
    scaled = x * torch.tensor([1.0, 10.0, 0.1, 100.0], dtype=torch.float64)
    with dhf.GaussNewton(objective, [(scaled, y)]) as A:
        H = A.shifted(1e-4)
        plain = dhf.cg(H, -A.gradient, rtol=1e-8)
        preconditioned = dhf.cg(H, -A.gradient, rtol=1e-8, preconditioner=KFAC()(A, 1e-4))
    assert preconditioned.converged
    assert preconditioned.iterations < plain.iterations
    assert relative_error(preconditioned.x, plain.x) < 1e-3


def test_diagonal_tends_to_that_of_the_fisher_matrix() -> None:
    """Half of samples x (mean gradient)² and half of its tensor mean has the mean of half and half of the Fisher diagonal."""
    objective, batch = objective_of("cross_entropy")
    draws, first = 800, 4 * 5 + 5
    total = torch.zeros(10, dtype=torch.float64)
    with dhf.GaussNewton(objective, [batch]) as A:
        for seed in range(draws):
            kfac = KFAC(seed=seed)
            kfac(A, 1.0)
            total += kfac.state_dict()["diagonal"][first : first + 10] / draws
    x, module = batch[0], objective.module
    p = torch.softmax(module_outputs(module, x), 1)
    diagonal = torch.zeros(10, dtype=torch.float64)
    for i in range(len(x)):
        for label in range(CLASSES):
            value = nn.functional.cross_entropy(module(x[i : i + 1]), torch.tensor([label]))
            g = flat(torch.autograd.grad(value, [module[1].weight, module[1].bias]))
            diagonal += p[i, label] * g.square() / len(x)
    halves = diagonal.view(2, 5)
    truth = (0.5 * halves + 0.5 * halves.mean(1, keepdim=True)).flatten()
    assert ((total - truth).abs() < 0.2 * truth).all()
