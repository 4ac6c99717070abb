"""The flat vector and the module's tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import dhf
from dhf.parameters import Parameters, _check_usable


class Mixed(nn.Module):
    """Frozen, tied, empty, scalar and ordinary parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.first = nn.Linear(2, 3, bias=False)
        self.again = nn.Linear(2, 3, bias=False)
        self.again.weight = self.first.weight
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.scalar = nn.Parameter(torch.tensor(5.0))


def test_frozen_left_out_tied_once_empty_kept() -> None:
    parameters = Parameters(Mixed())
    assert parameters.names == ("empty", "scalar", "first.weight")
    assert parameters.sizes == [0, 1, 6]
    assert parameters.numel == 7
    assert parameters.dtype == torch.float32
    assert parameters.device == torch.device("cpu")


def test_tensors_are_the_parameters_themselves() -> None:
    module = Mixed()
    assert Parameters(module).tensors[2] is module.first.weight


def test_read_write_split_flatten() -> None:
    module = Mixed()
    parameters = Parameters(module)
    values = torch.arange(7.0)
    frozen = module.frozen.weight.clone()
    parameters.write(values)
    assert torch.equal(parameters.read(), values)
    assert module.scalar.item() == 0
    assert torch.equal(module.again.weight, torch.arange(1.0, 7.0).view(3, 2))
    assert torch.equal(module.frozen.weight, frozen)
    assert [piece.shape for piece in parameters.split(values)] == [(0, 3), (), (3, 2)]
    assert torch.equal(parameters.flatten(parameters.split(values)), values)
    out = torch.empty(7)
    assert parameters.flatten(parameters.split(values), out=out) is out
    assert torch.equal(out, values)


def test_split_gives_views() -> None:
    v = torch.zeros(7)
    Parameters(Mixed()).split(v)[2].add_(1.0)
    assert v.tolist() == [0, 1, 1, 1, 1, 1, 1]


def test_read_gives_a_copy_without_a_graph() -> None:
    parameters = Parameters(Mixed())
    values = parameters.read()
    values.zero_()
    assert not values.requires_grad
    assert parameters.read()[0] == 5


def test_parameters_stored_in_another_order_of_memory() -> None:
    module = nn.Linear(3, 2, bias=False)
    module.weight = nn.Parameter(torch.arange(6.0).view(3, 2).T)
    parameters = Parameters(module)
    assert parameters.read().tolist() == [0, 2, 4, 1, 3, 5]
    parameters.write(torch.arange(6.0))
    assert module.weight.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Tanh(), "Tanh has no trainable parameter"),
        (nn.Linear(2, 2).requires_grad_(False), "Linear has no trainable parameter"),
        (nn.LazyLinear(2), "'weight' is uninitialised; run the lazy module"),
        (nn.Linear(2, 2).bfloat16(), "'weight' is torch.bfloat16.*module.float"),
        (nn.Linear(2, 2, dtype=torch.complex64), "'weight' is torch.complex64"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()), "dtype: '0.weight' is torch.float32 and '1.weight'"),
        (
            nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")),
            "device: '0.weight' is cpu and '1.weight' is meta",
        ),
        (nn.Embedding(0, 3), "every trainable parameter of Embedding is empty"),
    ],
)
def test_modules_that_cannot_be_used(module: nn.Module, words: str) -> None:
    with pytest.raises(dhf.UsageError, match=words):
        Parameters(module)


def test_dtensors_are_refused() -> None:
    class DTensor:
        data = SimpleNamespace()

    with pytest.raises(dhf.UsageError, match=r"'w' is a DTensor.*before it is sharded"):
        _check_usable(nn.Tanh(), [("w", DTensor())])


def test_vectors_that_do_not_fit() -> None:
    parameters = Parameters(Mixed())
    parameters.check_vector(torch.zeros(7))
    with pytest.raises(ValueError, match=r"shape \(7,\), got \(7, 1\)"):
        parameters.check_vector(torch.zeros(7, 1))
    with pytest.raises(ValueError, match=r"float32 on cpu, got torch.float64"):
        parameters.check_vector(torch.zeros(7, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"got torch.float32 on meta"):
        parameters.check_vector(torch.zeros(7, device="meta"))


MOVES: dict[str, Callable[[nn.Linear], None]] = {
    "in place": lambda m: torch.no_grad()(lambda: m.bias.add_(1.0))(),
    "through data": lambda m: m.bias.data.add_(1.0),
    "new data": lambda m: setattr(m.bias, "data", m.bias.data + 1.0),
    "by the smallest step": lambda m: m.bias.data.copy_(torch.nextafter(m.bias.data, torch.tensor(math.inf))),
}


@pytest.mark.parametrize("size", [3, 5000])
@pytest.mark.parametrize("move", list(MOVES))
def test_snapshot_notices_every_move(move: str, size: int) -> None:
    module = nn.Linear(2, size)
    parameters = Parameters(module)
    snapshot = parameters.snapshot()
    snapshot.check()
    assert int(snapshot.moved()) == 0
    MOVES[move](module)
    with pytest.raises(dhf.StaleGraphError, match="'bias' changed"):
        snapshot.check()
    assert int(snapshot.moved()) == 1


def test_snapshot_is_not_disturbed_by_reading() -> None:
    module = nn.Linear(2, 3)
    parameters = Parameters(module)
    snapshot = parameters.snapshot()
    module(torch.ones(1, 2)).sum().backward()
    parameters.read().add_(1.0)
    snapshot.check()
