"""Micro-batches from loaders and other iterables; what would count samples twice, or not at all, is refused."""

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler, TensorDataset

import dhf

X, Y = torch.randn(10, 3, dtype=torch.float64), torch.randn(10, 1, dtype=torch.float64)
DATA = TensorDataset(X, Y)


def objective() -> dhf.Objective:
    torch.manual_seed(0)
    return dhf.Objective(torch.nn.Linear(3, 1).double(), torch.nn.MSELoss())


def distributed(ranks: int, **options: bool) -> DataLoader:
    return DataLoader(DATA, batch_size=4, sampler=DistributedSampler(DATA, num_replicas=ranks, rank=0, **options))


@pytest.mark.parametrize(
    "batches",
    [
        lambda: DataLoader(DATA, batch_size=4),
        lambda: DataLoader(DATA, batch_size=3, shuffle=True),
        lambda: ((X[i : i + 1], Y[i : i + 1]) for i in range(10)),
        lambda: iter([(X, Y)]),
    ],
    ids=["loader", "shuffled loader", "generator", "iterator"],
)
def test_any_iterable_holds_micro_batches(batches):
    function = objective()
    with dhf.Hessian(function, batches()) as A:
        truth = torch.cat([X, torch.ones(10, 1, dtype=torch.float64)], 1)
        H = 2 / 10 * truth.T @ truth
        for i in range(4):
            assert torch.allclose(A @ torch.eye(4, dtype=torch.float64)[i], H[i], rtol=1e-12, atol=1e-14)
    report = dhf.HessianFree(function, damping=1e-8).step(batches())
    best = torch.linalg.lstsq(truth, Y).solution
    assert report.loss_after == pytest.approx(float((truth @ best - Y).square().mean()), rel=1e-6)


def test_a_data_set_is_no_list_of_micro_batches():
    for use in (lambda: dhf.Hessian(objective(), DATA), lambda: dhf.HessianFree(objective()).step(DATA)):
        with pytest.raises(dhf.UsageError, match=r"a TensorDataset holds samples; give dhf\.shard\(data, comm\)"):
            use()


@pytest.mark.parametrize(
    ("loader", "text"),
    [
        (distributed(4), "4 shares of one size from 10 samples, and repeats some"),
        (distributed(4, drop_last=True), "and leaves some out; give dhf.shard"),
        (DataLoader(DATA, batch_size=4, drop_last=True), "drop_last=True leaves out 2 samples"),
    ],
)
def test_a_sampler_that_pads_or_drops_is_refused(loader, text):
    with pytest.raises(dhf.UsageError, match=text):
        dhf.HessianFree(objective()).step(loader)


def test_a_loader_that_has_nothing_to_drop_is_taken():
    with dhf.GaussNewton(objective(), DataLoader(DATA, batch_size=5, drop_last=True)) as A:
        assert A.count == 10


def test_a_distributed_sampler_whose_shares_are_even_is_taken():
    with dhf.GaussNewton(objective(), distributed(5)) as A:
        assert A.count == 2


class BatchSamplerShard(BatchSampler):
    """Stands for Accelerate's of this name, by the attributes that it has."""

    def __init__(self, even_batches: bool) -> None:
        super().__init__(SequentialSampler(DATA), 4, False)
        self.num_processes, self.even_batches = 2, even_batches


def test_a_loader_that_accelerate_pads_is_refused():
    with pytest.raises(dhf.UsageError, match="even_batches=True, which repeats samples"):
        dhf.HessianFree(objective()).step(DataLoader(DATA, batch_sampler=BatchSamplerShard(True)))
    with dhf.GaussNewton(objective(), DataLoader(DATA, batch_sampler=BatchSamplerShard(False))) as A:
        assert A.count == 10
