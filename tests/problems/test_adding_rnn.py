"""The adding problem: its sequences, its network and its metrics."""

import numpy as np
import pytest
import torch

import dhf
from dhf.problems import Shard, build_problem
from dhf.problems.adding_rnn import AddingSequences, TanhRNN, draw_sequences

CPU = torch.device("cpu")


@pytest.mark.parametrize("length", [10, 50, 57])
def test_two_values_are_marked_where_they_should_be_and_their_sum_is_the_target(length):
    x, y = draw_sequences(2000, length, torch.Generator().manual_seed(0))
    values, markers = x[:, :, 0].numpy(), x[:, :, 1].numpy()
    assert set(np.unique(markers)) == {0.0, 1.0}
    assert (markers.sum(1) == 2).all()
    steps = np.array([np.flatnonzero(row) for row in markers])
    assert set(steps[:, 0]) == set(range(length // 10))
    assert set(steps[:, 1]) == set(range(length // 10, length // 2))
    np.testing.assert_allclose((values * markers).sum(1), y[:, 0].numpy(), rtol=1e-15)
    assert values.min() >= 0
    assert values.max() < 1
    assert values.mean() == pytest.approx(0.5, abs=0.02)
    # an answer of 1 has the variance of the sum of two uniform numbers
    assert float((y - 1).square().mean()) == pytest.approx(1 / 6, abs=0.02)


@pytest.mark.parametrize("batch_size", [None, 8])
def test_ranks_draw_the_same_sequences_and_each_step_new_ones(batch_size):
    data = AddingSequences(30, 10)

    def drawn(size: int, step: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
        parts = []
        for rank in range(size):
            torch.manual_seed(rank)  # whatever else has been drawn
            shard = Shard(data, rank, size, device=CPU, dtype=torch.float64, batch_size=batch_size, seed=seed)
            parts += shard.batches(step)
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    first = drawn(1, 0)
    assert first[0].shape == (batch_size or 30, 10, 2)
    assert first[1].shape == (batch_size or 30, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, drawn(3, 0), strict=True))
    later = [drawn(1, step)[1] for step in range(1, 8)]
    fresh = not any(torch.isin(first[1], y).any() for y in later)
    assert fresh == (batch_size is not None)
    if batch_size is not None:  # all samples at once are drawn once
        assert not torch.equal(drawn(1, 0, seed=1)[0], first[0])


def test_a_data_set_has_its_length():
    data = AddingSequences(3, 10)
    assert len(data) == 3
    assert data[-1][0].shape == (10, 2)
    with pytest.raises(IndexError, match="sample 3 of 3"):
        data[3]


def test_the_network_is_torchs_rnn_with_a_read_out():
    module = TanhRNN(2, 7, 1).double()
    torch.manual_seed(0)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    truth = torch.nn.RNN(2, 7, batch_first=True).double()
    with torch.no_grad():
        truth.weight_ih_l0.copy_(module.into.weight)
        truth.bias_ih_l0.copy_(module.into.bias)
        truth.weight_hh_l0.copy_(module.across.weight)
        truth.bias_hh_l0.zero_()
    x = torch.randn(5, 11, 2, dtype=torch.float64)
    states, _ = truth(x)
    torch.testing.assert_close(module(x), states[:, -1] @ module.out.weight.T + module.out.bias)


def test_the_start_is_sparse_and_on_the_edge_of_chaos():
    module = build_problem("adding-rnn", {}).objective.module
    recurrent = module.across.weight.detach().double().numpy()
    assert recurrent.shape == (100, 100)
    assert ((recurrent != 0).sum(1) == 15).all()
    assert np.abs(np.linalg.eigvals(recurrent)).max() == pytest.approx(1.1, rel=1e-3)
    assert not module.into.bias.any()
    assert module.out.bias.tolist() == [1.0]
    assert sum(p.numel() for p in module.parameters()) == 100 * (2 + 1 + 100 + 1) + 1


def test_metrics_are_taken_on_what_is_held_out():
    problem = build_problem("adding-rnn", {"hidden": 5})
    x = problem.validation[0]
    assert x.shape == (1000, 50, 2)
    again = build_problem("adding-rnn", {"hidden": 5}).validation
    assert torch.equal(again[0], x)
    assert not torch.equal(build_problem("adding-rnn", {"hidden": 5, "seed": 1}).validation[0], x)

    class Guess(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.off = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """The truth for a half of the sequences, and beside it for the others."""
            truth = (x[:, :, 0] * x[:, :, 1]).sum(1, keepdim=True)
            return truth + self.off * (torch.arange(len(x)) % 2).view(-1, 1)

    guess = Guess()
    for off, wrong in ((0.0, 0.0), (0.039, 0.0), (-0.041, 0.5)):
        guess.off.data.fill_(off)
        metrics = problem.metrics(guess)
        assert metrics["error_rate"] == wrong
        assert metrics["mse"] == pytest.approx(off**2 / 2, rel=1e-9, abs=1e-30)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"length": 9}, "length must be a whole number and at least 10, got 9"),
        ({"length": 20.5}, "length must be a whole number"),
        ({"hidden": 0}, "hidden must be a whole number and at least 1"),
        ({"samples": 0}, "samples must be a whole number and at least 1"),
        ({"seed": -3}, "seed must be a whole number and at least 0"),
    ],
)
def test_options_are_checked(options, text):
    with pytest.raises(dhf.UsageError, match=text):
        build_problem("adding-rnn", options)
    with pytest.raises(dhf.UsageError, match="length of at least 10"):
        draw_sequences(1, 9)
