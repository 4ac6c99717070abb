"""micro_batches(): a rank's micro-batches, from whatever iterable holds them; what would be wrong silently is refused.

A loader that pads shards to one size, as DistributedSampler does, counts samples twice; a data set iterates over samples, whose
first dimension would be taken for a number of samples.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset

from dhf.errors import UsageError

__all__ = ["micro_batches", "require_exact_sampler"]


def micro_batches(batches: Iterable[Any]) -> list[Any]:
    """The micro-batches as a list; a DataLoader, a generator or any other iterable is read once.

    Args:
        batches: This rank's micro-batches, each what ``objective.outputs`` takes.

    Raises:
        UsageError: If it is a data set, or a loader that repeats samples or leaves some out.
    """
    if isinstance(batches, Dataset):
        raise UsageError(
            f"batches must hold micro-batches, and a {type(batches).__name__} holds samples; "
            "give dhf.shard(data, comm), this rank's part of it"
        )
    if isinstance(batches, DataLoader):
        require_exact_sampler(batches)
    return list(batches)


def require_exact_sampler(loader: DataLoader[Any]) -> None:
    """Raise UsageError if the ranks' shares of a loader do not hold every sample once.

    Known are torch's DistributedSampler, which pads or leaves out to make shares of one size, ``drop_last``, and Accelerate's
    BatchSamplerShard.
    """
    sampler: Any = loader.sampler
    if isinstance(sampler, DistributedSampler):
        samples = len(sampler.dataset)  # type: ignore[arg-type]
        if sampler.total_size != samples:
            what = "repeats some" if sampler.total_size > samples else "leaves some out"
            raise UsageError(
                f"the loader's DistributedSampler makes {sampler.num_replicas} shares of one size from {samples} samples, and "
                f"{what}; give dhf.shard(data, comm), which divides them as they are"
            )
    inner: Any = loader.batch_sampler
    left = 0
    if type(inner) is BatchSampler and inner.drop_last and not isinstance(loader.dataset, IterableDataset):
        left = len(inner.sampler) % inner.batch_size  # type: ignore[arg-type]
    if left:
        raise UsageError(
            f"the loader's drop_last=True leaves out {left} samples, and the objective is a mean over all; give drop_last=False"
        )
    if type(inner).__name__ == "BatchSamplerShard" and inner.num_processes > 1 and getattr(inner, "even_batches", True):
        raise UsageError(
            "the loader was prepared by Accelerate with even_batches=True, which repeats samples so that all ranks have as many; "
            "give Accelerator(dataloader_config=DataLoaderConfiguration(even_batches=False)), or dhf.shard(data, comm)"
        )
