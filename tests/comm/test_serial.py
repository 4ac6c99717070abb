"""The communicator of one process."""

from __future__ import annotations

import torch

import dhf
from dhf.comm import Serial


def test_one_rank_that_talks_to_nobody() -> None:
    comm = Serial()
    buffer = torch.tensor([1.0, 2.0])
    comm.all_reduce(buffer)
    comm.broadcast(buffer)
    assert buffer.tolist() == [1, 2]
    assert comm.collectives == 2
    assert comm.gather_objects({"a": 1}) == [{"a": 1}]
    comm.barrier(timeout=0.0)
    comm.close()
    comm.close()
    assert (comm.rank, comm.size, comm.backend, comm.device) == (0, 1, "serial", torch.device("cpu"))


def test_connect_without_a_launcher_is_serial(monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(dhf.connect(device="cpu"), Serial)
    assert not torch.distributed.is_initialized()
