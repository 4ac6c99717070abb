"""The forms of training data: tensors, data sets, loaders and iterables give the same shards on any number of ranks."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import dhf
from dhf.problems import Shard
from dhf.problems.data import as_data, some_of
from tests.ranks import ranks

N = 11
X = torch.randn(N, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
Y = X.sin().sum(1, keepdim=True)
SET = TensorDataset(X, Y)


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(list(zip(X, Y, strict=True)))


Pair = collections.namedtuple("Pair", "x y")


def stacked(samples: list) -> Pair:
    """A collate_fn of a user's own."""
    return Pair(torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples]))


FORMS = {
    "data set": lambda: SET,
    "list of samples": lambda: list(zip(X, Y, strict=True)),
    "generator": lambda: (sample for sample in zip(X, Y, strict=True)),
    "stream": lambda: Stream(),
    "loader": lambda: DataLoader(SET, batch_size=4),
    "shuffled loader": lambda: DataLoader(SET, batch_size=4, shuffle=True),
    "loader of a stream": lambda: DataLoader(Stream(), batch_size=4),
    "loader with a collate_fn": lambda: DataLoader(SET, batch_size=4, collate_fn=stacked),
}


def train(comm, form: str | None, batch_size: int | None = None) -> tuple[list[float], torch.Tensor, int]:
    """Losses of a few steps, the parameters, and this rank's micro-batches of the first step."""
    torch.manual_seed(3)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    data = (X, Y) if form is None else FORMS[form]()
    problem = dhf.Problem(dhf.Objective(module, torch.nn.MSELoss()), data)
    shard = Shard(
        problem.train, comm.rank, comm.size, device=comm.device, dtype=torch.float64, batch_size=batch_size, seed=1
    )
    optimizer = dhf.HessianFree(problem.objective, comm=comm, preset="deep-net")
    losses = [optimizer.step(shard.batches(step)).loss_after for step in range(3)]
    return losses, torch.nn.utils.parameters_to_vector(module.parameters()).detach(), len(shard.batches(0))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_form_trains_as_tensors_do_on_one_rank(size):
    truth, theta, _ = ranks(1, train, form=None)[0]
    for form in FORMS:
        for rank, (losses, found, micro_batches) in enumerate(ranks(size, train, form=form)):
            assert losses == pytest.approx(truth, rel=1e-9), form
            assert torch.allclose(found, theta, rtol=1e-9, atol=1e-12), form
            mine = len(np.array_split(np.arange(N), size)[rank])
            assert micro_batches == (-(-mine // 4) if "loader" in form else 1)


def test_mini_batches_of_a_loader_are_those_of_its_data():
    truth, theta, _ = ranks(1, train, form=None, batch_size=6)[0]
    for losses, found, _ in ranks(2, train, form="shuffled loader", batch_size=6):
        assert losses == pytest.approx(truth, rel=1e-9)
        assert torch.allclose(found, theta, rtol=1e-9, atol=1e-12)


def whole(comm, form: str) -> list[torch.Tensor]:
    return [y for _, y in dhf.shard(FORMS[form](), comm)]


@pytest.mark.parametrize("form", FORMS)
def test_shard_gives_every_sample_once(form):
    parts = [y for mine in ranks(3, whole, form=form) for y in mine]
    assert torch.equal(torch.cat(parts), Y)


def test_named_tuples_keep_their_names_and_dtypes_are_left_alone():
    (batch,) = dhf.shard(DataLoader(SET, batch_size=20, collate_fn=stacked))
    assert type(batch) is Pair
    assert batch.x.dtype == torch.float64
    (batch,) = dhf.shard(SET, dtype=torch.float32)
    assert batch[0].dtype == torch.float32


def test_what_the_user_says_goes_before_the_loader():
    assert len(dhf.shard(DataLoader(SET, batch_size=4), micro_batch_size=2)) == 6


class Unseeded(Dataset):
    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def __len__(self) -> int:
        return 5

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.tensor(i + self.generator.random())


def loader(**options) -> DataLoader:
    return DataLoader(SET, batch_size=options.pop("batch_size", 4), **options)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            lambda: loader(sampler=DistributedSampler(SET, 2, 0)),
            "has a DistributedSampler, and dhf divides the samples",
        ),
        (lambda: loader(sampler=RandomSampler(SET, replacement=True)), "has a RandomSampler, which may repeat samples"),
        (lambda: loader(sampler=WeightedRandomSampler([1.0] * N, N)), "has a WeightedRandomSampler, which may repeat"),
        (lambda: loader(sampler=SubsetRandomSampler(range(5))), r"Subset\(dataset, indices\)"),
        (lambda: loader(drop_last=True), "leaves out 3 of 11 samples"),
        (lambda: DataLoader(SET, batch_size=None), "makes its own batches, by batch_size=None"),
        (
            lambda: DataLoader(SET, batch_sampler=[[0, 1], [2, 3]]),
            "makes its own batches, by a list",
        ),
        (lambda: {"x": X}, "a dict holds none; give a tuple of tensors"),
        (lambda: 7, "data must be samples, got int"),
        (lambda: (X, Y[:3]), "one leading dimension"),
    ],
)
def test_what_counts_samples_otherwise_is_refused(data, text):
    objective = dhf.Objective(torch.nn.Linear(3, 1), torch.nn.MSELoss())
    with pytest.raises(dhf.UsageError, match=text):
        dhf.Problem(objective, data())
    with pytest.raises(dhf.UsageError, match=text):
        dhf.Problem(objective, SET, validation=data())


def test_torchs_own_batch_sampler_is_looked_into():
    taken = as_data(DataLoader(SET, batch_sampler=BatchSampler(RandomSampler(SET), 3, False)))
    assert (taken.micro_batch_size, len(taken)) == (3, N)
    with pytest.raises(dhf.UsageError, match="drop_last=True leaves out 2 of 11"):
        as_data(DataLoader(SET, batch_sampler=BatchSampler(SequentialSampler(SET), 3, True)))
    assert len(as_data(DataLoader(SET, batch_size=N, drop_last=True))) == N


def test_a_generator_of_its_own_in_a_data_set_is_named():
    with pytest.raises(dhf.UsageError, match="sample 0 of the data is another one each time it is read"):
        dhf.shard(Unseeded())


def test_an_iterable_without_end_is_told_before_memory_is_gone(monkeypatch):
    monkeypatch.setattr("dhf.problems.data.available_memory", lambda device: 1e6)
    with pytest.raises(dhf.UsageError, match=r"has given \d,\d+ samples, .* and goes on"):
        as_data(torch.zeros(100) for _ in itertools.count())


def test_an_iterable_serves_more_than_one_shard():
    problem = dhf.Problem(dhf.Objective(torch.nn.Linear(3, 1), torch.nn.MSELoss()), FORMS["generator"]())
    assert [len(dhf.shard(problem.train)[0][0]) for _ in range(2)] == [N, N]


def test_padding_in_a_collate_fn_does_not_name_a_wrong_sample():
    def packed(samples: list) -> torch.Tensor:
        return torch.cat([x for x, _ in samples])

    x = X.clone()
    x[5, 1] = float("nan")
    with pytest.raises(dhf.UsageError, match="one of samples 4 to 7 of the data holds NaN"):
        dhf.shard(DataLoader(TensorDataset(x, Y), batch_size=4, collate_fn=packed))


class Transformed(TensorDataset):
    """Tensors whose samples are made of them, not slices of them."""

    def __init__(self, factor: float, noise: float = 0.0) -> None:
        super().__init__(X, Y)
        self.factor, self.noise = factor, noise
        self.own = torch.Generator().manual_seed(1)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        x, y = super().__getitem__(index)
        return self.factor * x + self.noise * torch.randn(3, generator=self.own), y


def test_samples_that_a_subclass_makes_of_tensors_are_taken_as_it_makes_them() -> None:
    def facts(data: Dataset) -> dict[str, str]:
        return Shard(data, 0, 1, device=torch.device("cpu"), dtype=None).facts()

    some = Shard(some_of(Transformed(2.0), [3, 1]), 0, 1, device=torch.device("cpu"), dtype=None)
    assert torch.equal(some.batches(0)[0][0], 2 * X[[3, 1]])
    assert facts(Transformed(2.0)) != facts(Transformed(3.0))  # as two ranks might hold them
    with pytest.raises(dhf.UsageError, match="another one each time"):
        dhf.shard(Transformed(1.0, noise=1.0))


class Drawn(Dataset):
    """Samples that are drawn at random, as by augmentation."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> torch.Tensor:
        return index + torch.rand(3)


def test_chosen_samples_are_those_of_the_whole() -> None:
    whole, some = (
        Shard(data, 0, 1, device=torch.device("cpu"), dtype=None, seed=5).batches(0)[0]
        for data in (Drawn(), some_of(Drawn(), [7, 2]))
    )
    assert torch.equal(some, whole[[7, 2]])
