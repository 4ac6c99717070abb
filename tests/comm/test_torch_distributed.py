"""TorchDistributed over gloo: sums, objects, several communicators, teardown, and ranks that are lost."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dhf import CommunicationError
from dhf.comm import Communicator, TorchDistributed
from tests.ranks import TIMEOUT, Died, ranks, try_ranks

CPU = torch.device("cpu")


def talk(comm: Communicator, dtype: torch.dtype) -> tuple[Tensor, Tensor, list, int]:
    total = torch.arange(3, dtype=dtype) + comm.rank
    comm.all_reduce(total)
    copy = torch.full((2,), comm.rank, dtype=dtype)
    comm.broadcast(copy, source=comm.size - 1)
    before = comm.collectives
    objects = comm.gather_objects({"rank": comm.rank})
    comm.barrier()
    return total, copy, objects, comm.collectives - before


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_sums_copies_and_objects(size: int, dtype: torch.dtype) -> None:
    for total, copy, objects, counted in ranks(size, talk, dtype=dtype):
        assert total.tolist() == [size * i + size * (size - 1) // 2 for i in range(3)]
        assert copy.tolist() == [size - 1] * 2
        assert objects == [{"rank": r} for r in range(size)]
        assert counted == 0


def in_pieces(comm: Communicator, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, int]:
    """A sum's piece, all pieces of it, and a sum that was only started at first."""
    whole = torch.arange(3 * comm.size, dtype=dtype) * (comm.rank + 1)
    piece = torch.empty(3, dtype=dtype)
    comm.reduce_scatter(whole, piece)
    again = torch.empty(3 * comm.size, dtype=dtype)
    comm.all_gather(piece, again)
    parts = [torch.full((5,), float(part + comm.rank)).to(dtype) for part in range(3)]
    started = [comm.start_all_reduce(part) for part in parts]
    for pending in started:
        pending.wait()
    return piece, again, torch.stack(parts), comm.collectives


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pieces_and_early_starts(size: int, dtype: torch.dtype) -> None:
    factor, numbers = size * (size + 1) // 2, torch.arange(3 * size, dtype=dtype)
    found = ranks(size, in_pieces, dtype=dtype)
    for rank, (piece, again, parts, _) in enumerate(found):
        assert torch.equal(piece, factor * numbers[3 * rank : 3 * rank + 3])
        assert torch.equal(again, factor * numbers)
        assert parts[:, 0].tolist() == [size * part + size * (size - 1) // 2 for part in range(3)]


def round_trip(comm: Communicator) -> Tensor:
    numbers = torch.tensor([1.0, 2.0, 3.0]).bfloat16()
    comm.all_reduce(numbers)
    return numbers


def test_half_precision_is_summed_too() -> None:
    for numbers in ranks(3, round_trip):
        assert numbers.tolist() == [3.0, 6.0, 9.0]


def uneven_sum(comm: Communicator, number: int) -> Tensor:
    values = torch.rand(number, generator=torch.Generator().manual_seed(comm.rank))
    comm.all_reduce(values)
    return values


@pytest.mark.parametrize("number", [1, 1001])
def test_every_rank_receives_the_same_bits(number: int) -> None:
    first, *others = ranks(4, uneven_sum, number=number)
    assert all(torch.equal(first, other) for other in others)


def several(comm: Communicator) -> list[tuple[float, bool]]:
    """Two more communicators in one process, closed in another order than opened; then the first is still of use."""
    second = TorchDistributed(CPU, "gloo", timeout=20)
    third = TorchDistributed(CPU, "gloo", timeout=20)
    found = []
    for other in (second, third, comm):
        one = torch.ones(1)
        other.all_reduce(one)
        found.append((one.item(), dist.is_initialized()))
        if other is not comm:
            other.close()
            other.close()
    return found


def test_several_communicators_in_one_process() -> None:
    assert ranks(3, several) == [[(3.0, True)] * 3] * 3


def close(comm: Communicator) -> tuple[bool, bool]:
    before = dist.is_initialized()
    comm.close()
    comm.close()
    return before, dist.is_initialized()


def test_closing_leaves_no_group_open() -> None:
    assert ranks(2, close, fresh=True) == [(True, False)] * 2
    assert not dist.is_initialized()


def late(comm: Communicator, missing: list[int]) -> None:
    if comm.rank not in missing:
        comm.barrier(timeout=1.0)


@pytest.mark.parametrize("missing", [[2], [1, 3]])
def test_a_barrier_names_the_ranks_that_did_not_come(missing: list[int]) -> None:
    outcomes = try_ranks(4, late, fresh=True, missing=missing)
    assert outcomes[0].type == "CommunicationError"
    assert "barrier" in outcomes[0].text
    assert ", ".join(map(str, missing)) in outcomes[0].text
    for rank in missing:
        assert outcomes[rank] is None


def killed(comm: Communicator, bad: int) -> str:
    """What a rank is told when another has gone; it then leaves, so that its own neighbours learn of it as well."""
    comm.barrier()
    if comm.rank == bad:
        os._exit(9)
    try:
        while True:
            comm.all_reduce(torch.ones(1))
    except CommunicationError as error:
        return str(error)
    finally:
        comm.close()


def test_a_killed_rank_is_noticed_before_the_timeout() -> None:
    outcomes = try_ranks(4, killed, fresh=True, bad=1, patience=TIMEOUT / 2)
    assert outcomes[1] == Died(9)
    for rank in (0, 2, 3):
        assert outcomes[rank].startswith("rank 1 missing in all-reduce: died (")
