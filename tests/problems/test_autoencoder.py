"""What the autoencoders share: network, start, metric and picture."""

import numpy as np
import pytest
import torch

import dhf
from dhf.problems.autoencoder import autoencoder_problem, sigmoid_network, sparse_initialisation


def images(number: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).random((number, 9)))


def test_the_network_has_sigmoids_between_its_layers_and_logits_out():
    module = sigmoid_network((4, 3, 2, 4)).double()
    first, second, third = (m for m in module if isinstance(m, torch.nn.Linear))
    x = torch.rand(5, 4, dtype=torch.float64)
    h = x
    for layer in (first, second):
        h = 1 / (1 + (-(h @ layer.weight.T + layer.bias)).exp())
    torch.testing.assert_close(module(x), h @ third.weight.T + third.bias)


def test_sparse_initialisation_has_so_many_weights_a_unit():
    module = torch.nn.Sequential(torch.nn.Linear(40, 30), torch.nn.Linear(6, 5))
    sparse_initialisation(module, 15)
    assert (module[0].weight != 0).sum(1).tolist() == [15] * 30
    assert (module[1].weight != 0).sum(1).tolist() == [6] * 5
    assert not module[0].bias.any()


@pytest.mark.parametrize("validation", [None, 4])
def test_the_metric_is_the_squared_distance_of_what_is_held_out(validation):
    train, held_out = images(7), None if validation is None else images(11)[7:]
    problem = autoencoder_problem((9, 3, 9), train, 2, validation=held_out)
    module = problem.objective.module.double()
    measured = train if held_out is None else held_out
    assert problem.validation is None or problem.validation[0] is held_out
    rebuilt = 1 / (1 + np.exp(-module(measured).detach().numpy()))
    truth = ((rebuilt - measured.numpy()) ** 2).sum() / len(measured)
    assert problem.metrics(module)["squared_error"] == pytest.approx(truth, rel=1e-12)


@pytest.mark.parametrize("number", [1, 3, 30])
def test_the_picture_is_drawn_of_any_number_of_images(tmp_path, number):
    problem = autoencoder_problem((9, 3, 9), images(number), 2)
    (path,) = problem.pictures(problem.objective.module, tmp_path)
    assert path.name == "reconstructions.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("connections", [0, -1, 1.5, True, "many"])
def test_connections_are_whole(connections):
    with pytest.raises(
        dhf.UsageError, match=r"connections must be a whole number and at least 1, got .*--options\.connections"
    ):
        autoencoder_problem((9, 3, 9), images(2), connections)
