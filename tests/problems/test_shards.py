"""Shards: every sample once, the same ones whatever the number of ranks."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

import dhf
from dhf.problems import Shard

CPU = torch.device("cpu")


def shard(data, rank=0, size=1, **options):
    return Shard(data, rank, size, device=CPU, dtype=torch.float64, **options)


def numbered(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(float(n)).view(n, 1), torch.arange(n)


def labels(batches) -> list[int]:
    return [int(i) for _, y in batches for i in y]


@given(
    n=st.integers(1, 40),
    size=st.integers(1, 6),
    batch=st.none() | st.integers(1, 50),
    micro=st.none() | st.integers(1, 7),
    step=st.integers(0, 30),
)
def test_ranks_together_hold_what_one_rank_holds(n, size, batch, micro, step):
    options = {"batch_size": batch, "micro_batch_size": micro, "seed": 3}
    alone = labels(shard(numbered(n), batch_size=batch, seed=3).batches(step))
    parts = [shard(numbered(n), r, size, **options).batches(step) for r in range(size)]
    assert [i for part in parts for i in labels(part)] == alone
    assert all(len(y) <= (micro or n) for part in parts for _, y in part)
    assert len(set(alone)) == len(alone)


def test_an_epoch_takes_every_sample_once_and_the_next_one_in_another_order():
    data = shard(numbered(10), batch_size=4)
    first = [i for step in range(3) for i in labels(data.batches(step))]
    second = [i for step in range(3, 6) for i in labels(data.batches(step))]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


def test_an_empty_shard_has_no_batches():
    assert shard(numbered(2), 2, 3).batches(0) == []
    assert shard(numbered(2), 0, 3).sizes() == [1, 1, 0]


class Words(Dataset):
    """Samples that are dictionaries."""

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return {"ids": torch.tensor([i, i + 1]), "weight": float(i)}


def test_a_dataset_of_dictionaries_is_collated():
    (batch,) = shard(Words()).batches(0)
    assert batch["ids"].tolist() == [[0, 1], [1, 2], [2, 3]]
    assert batch["weight"].dtype == torch.float64


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_data_name_the_sample(value):
    x, y = numbered(20)
    x[13] = value
    assert len(shard((x, y), 0, 2).batches(0)) == 1
    with pytest.raises(dhf.UsageError, match="sample 13 of the data holds NaN or infinity"):
        shard((x, y), 1, 2, micro_batch_size=2).batches(0)


@pytest.mark.parametrize(
    ("data", "options", "text"),
    [
        ((torch.zeros(0, 2),), {}, "the data set is empty"),
        ((torch.zeros(3), torch.zeros(4)), {}, r"one leading dimension, the samples; got \(\(3,\), \(4,\)\)"),
        (7, {}, "map-style data set"),
        (numbered(3), {"batch_size": 0}, "--batch-size must be at least 1"),
        (numbered(3), {"micro_batch_size": -1}, "--micro-batch-size must be at least 1"),
    ],
)
def test_unusable_data_are_refused(data, options, text):
    with pytest.raises(dhf.UsageError, match=text):
        shard(data, **options)


class Augmented(Dataset):
    """Draws from all three generators."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = torch.rand(2) + random.random() + np.random.random()  # noqa: NPY002
        return torch.full((2,), float(i)) + noise, torch.tensor(float(i))


@pytest.mark.parametrize("batch_size", [None, 4])
def test_random_samples_are_drawn_alike_by_any_number_of_ranks_and_after_a_resume(batch_size):
    def drawn(size: int, step: int) -> torch.Tensor:
        parts = []
        for rank in range(size):
            mine = shard(Augmented(), rank, size, batch_size=batch_size)
            torch.rand(rank + 1)  # whatever else has been drawn
            parts += [batch[0] for batch in mine.batches(step)]
        return torch.cat(parts)

    for step in (0, 3):
        assert torch.equal(drawn(1, step), drawn(3, step))
    if batch_size is not None:
        one, other = drawn(1, 0), drawn(1, 3)
        assert not any(torch.equal(row, x) for row in one for x in other)  # drawn anew


def _seed() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002


def test_the_global_generators_are_left_alone():
    augmented = shard(Augmented())
    _seed()
    truth = torch.rand(()), random.random(), np.random.random()  # noqa: NPY002
    _seed()
    augmented.batches(0)
    augmented.facts()
    assert (torch.rand(()), random.random(), np.random.random()) == truth  # noqa: NPY002


def test_a_list_of_samples_is_a_data_set():
    samples = [(torch.full((2,), float(i)), i) for i in range(5)]
    (batch,) = shard(samples).batches(0)
    assert batch[0].shape == (5, 2)
    assert batch[1].tolist() == [0, 1, 2, 3, 4]


def test_the_facts_tell_data_apart():
    def facts(data) -> dict[str, str]:
        return shard(data).facts()

    x = torch.arange(12.0).view(6, 2)
    assert facts((x,)) == facts((x.clone(),))
    other = x.clone()
    other[5, 1] += 1e-6 * 11
    assert facts((x,))["content"] != facts((other,))["content"]
    assert facts((x,))["form"] == facts((other,))["form"] != facts((x.double(),))["form"]
    assert facts([{"a": row, "b": "text"} for row in x]) == facts([{"a": row, "b": "text"} for row in x])
    assert facts([{"a": row, "b": "text"} for row in x]) != facts([{"a": row, "b": "other"} for row in x])


@pytest.mark.parametrize("batch_size", [None, 7])
def test_a_sample_is_found_again_by_its_place(batch_size):
    x = torch.arange(23.0).view(-1, 1)
    make = functools.partial(Shard, (x,), size=3, device=CPU, dtype=torch.float32)
    first = make(rank=0, batch_size=batch_size, micro_batch_size=2)
    for rank in range(3):
        mine = make(rank=rank, batch_size=batch_size, micro_batch_size=2)
        for j, (batch,) in enumerate(mine.batches(1)):
            for row, value in enumerate(batch):
                assert first.place(1, rank, j, row) == int(value)
