"""connect() and detect(): what the environment says, and what is refused."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist

import dhf
from dhf.comm import Communicator
from dhf.comm.launch import Launch, detect, first_host
from tests.ranks import ranks, try_ranks

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "42",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "PMI_SIZE": "6",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "6",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
MPICH = {"PMI_SIZE": "6", "PMI_RANK": "5", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}


# detect


def test_nothing_set_is_one_process() -> None:
    assert detect({}) == Launch("none")


def test_torchrun() -> None:
    full = {**TORCHRUN, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "3"}
    assert detect(full) == Launch("torchrun", 3, 8, 1, 2, "10.0.0.1", 29500, "3")


def test_torchrun_variables_without_local_ones() -> None:
    assert detect(TORCHRUN) == Launch("torchrun", 3, 8, 3, 8, "10.0.0.1", 29500, "0")


@pytest.mark.parametrize("missing", list(TORCHRUN))
def test_incomplete_torchrun_variables(missing: str) -> None:
    with pytest.raises(dhf.UsageError, match=f"set but {missing} not: start with torchrun"):
        detect({name: value for name, value in TORCHRUN.items() if name != missing})


def test_a_rank_alone() -> None:
    with pytest.raises(dhf.UsageError, match="RANK set but WORLD_SIZE, MASTER_ADDR, MASTER_PORT not"):
        detect({"RANK": "0"})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"RANK": "8"}, "RANK=8 is not in 0 to WORLD_SIZE-1=7"),
        ({"RANK": "-1"}, "RANK=-1 is not in 0"),
        ({"WORLD_SIZE": "many"}, "must be integers.*many"),
        ({"MASTER_PORT": "http"}, "must be integers.*http"),
    ],
)
def test_contradictory_torchrun_variables(changed: dict[str, str], words: str) -> None:
    with pytest.raises(dhf.UsageError, match=words):
        detect({**TORCHRUN, **changed})


def test_srun() -> None:
    launch = detect(SRUN)
    assert (launch.launcher, launch.rank, launch.size) == ("slurm", 5, 6)
    assert (launch.local_rank, launch.local_size) == (1, 2)
    assert launch.address == "gpu07"
    assert 20000 <= launch.port < 40000
    assert launch.attempt == "0"


def test_srun_ports_differ_between_steps_and_agree_within_one() -> None:
    assert detect(SRUN).port == detect({**SRUN, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}).port
    assert detect(SRUN).port != detect({**SRUN, "SLURM_STEP_ID": "2"}).port
    assert detect(SRUN).port != detect({**SRUN, "SLURM_JOB_ID": "43"}).port


def test_srun_with_an_address_and_a_restart() -> None:
    launch = detect({**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "1234", "SLURM_RESTART_COUNT": "2"})
    assert (launch.address, launch.port, launch.attempt) == ("head", 1234, "2")


@pytest.mark.parametrize(("node", "tasks"), [("0", 3), ("1", 3), ("2", 1)])
def test_srun_with_uneven_nodes(node: str, tasks: int) -> None:
    assert detect({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "3(x2),1", "SLURM_NODEID": node}).local_size == tasks


def test_the_batch_shell_is_one_process() -> None:
    shell = {"SLURM_JOB_ID": "42", "SLURM_NTASKS": "6", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "gpu[07-09]"}
    assert detect(shell) == Launch("none")


def test_torchrun_under_srun_is_torchrun() -> None:
    assert detect({**SRUN, **TORCHRUN}).launcher == "torchrun"


@pytest.mark.parametrize("variables", [OPEN_MPI, MPICH])
def test_mpirun(variables: dict[str, str]) -> None:
    assert detect(variables) == Launch("mpirun", 5, 6, 1, 2, address="")
    met = detect({**variables, "MASTER_ADDR": "head", "MASTER_PORT": "1234", "SLURM_RESTART_COUNT": "2"})
    assert met == Launch("mpirun", 5, 6, 1, 2, "head", 1234, "2")


@pytest.mark.parametrize("variables", [OPEN_MPI, MPICH])
def test_mpirun_in_a_slurm_job_is_mpirun(variables: dict[str, str]) -> None:
    """It has srun start a daemon on each node, whose variables the ranks inherit."""
    daemon = {**SRUN, "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x3)"}
    assert detect({**daemon, **variables}) == Launch("mpirun", 5, 6, 1, 2, address="")


def test_variables_of_pmi_alone() -> None:
    assert detect({"PMI_SIZE": "4", "PMI_RANK": "3"}) == Launch("mpirun", 3, 4, 3, 4, address="")


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MPI_LOCALNRANKS"])
def test_mpirun_of_one_process_is_one_process(variable: str) -> None:
    assert detect({variable: "1"}) == Launch("none")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu3", "gpu3"),
        ("gpu3,gpu5", "gpu3"),
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("gpu[3,7]", "gpu3"),
        ("a-long-name-[1-3]", "a-long-name-1"),
        ("login-1,gpu[1-2]", "login-1"),
        ("gpu[03-05]-ib", "gpu03-ib"),
        ("rack[1-2]node[3-4]", "rack1node3"),
        ("n1.cluster.org,n2.cluster.org", "n1.cluster.org"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_no_first_host() -> None:
    with pytest.raises(dhf.UsageError, match="set MASTER_ADDR"):
        first_host("")


# connect


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No launcher's variables."""
    for name in (*TORCHRUN, *SRUN, *OPEN_MPI, *MPICH, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": "smoke"}, "backend 'smoke' is unknown; choose from auto, nccl, gloo"),
        ({"device": "tpu"}, "device 'tpu' is unknown; choose from auto, cpu, cuda"),
        ({"backend": "gloo"}, "--backend gloo needs ranks: start with torchrun or srun"),
        ({"backend": "nccl", "device": "cpu"}, "--backend nccl needs a GPU per rank: found 0, asked for 1"),
    ],
)
def test_requests_that_cannot_be_met(environment: pytest.MonkeyPatch, options: dict[str, str], words: str) -> None:
    with pytest.raises(dhf.UsageError, match=words):
        dhf.connect(**options)


def test_requests_for_gpus_without_any(environment: pytest.MonkeyPatch) -> None:
    environment.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(dhf.UsageError, match="--device cuda needs a GPU that torch can use: found none"):
        dhf.connect(device="cuda")
    for name, value in {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "4"}.items():
        environment.setenv(name, value)
    with pytest.raises(dhf.UsageError, match="found 0, asked for 4; use --backend gloo"):
        dhf.connect("nccl")


def test_serial_with_several_ranks(environment: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        environment.setenv(name, value)
    with pytest.raises(dhf.UsageError, match="serial is one process, but 8 ranks were started"):
        dhf.connect("serial")


def test_mpi_with_ranks_that_mpi_does_not_know(environment: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        environment.setenv(name, value)
    words = "--backend mpi needs ranks that MPI knows, and torchrun started these; use mpirun or srun"
    with pytest.raises(dhf.UsageError, match=words):
        dhf.connect("mpi", device="cpu")


def test_threads(environment: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        dhf.connect("serial", threads=2)
        assert torch.get_num_threads() == 2
        dhf.connect("serial")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def _as_rank(comm: Communicator, port: int, launcher: str) -> None:
    """Leave the harness's ranks, and wear the variables of a launcher."""
    comm.close()
    names = {
        "torchrun": {"RANK": comm.rank, "WORLD_SIZE": comm.size, "MASTER_ADDR": "localhost", "MASTER_PORT": port},
        "slurm": {
            "SLURM_JOB_ID": 1,
            "SLURM_STEP_NUM_TASKS": comm.size,
            "SLURM_PROCID": comm.rank,
            "SLURM_LOCALID": comm.rank,
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_STEP_TASKS_PER_NODE": comm.size,
            "MASTER_PORT": port,
        },
    }
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        os.environ.pop(name, None)
    os.environ.update({name: str(value) for name, value in names[launcher].items()})


def connect_twice(comm: Communicator, port: int, launcher: str) -> list[tuple]:
    """Two connections one after another, each closed."""
    _as_rank(comm, port, launcher)
    found = []
    for _ in range(2):
        other = dhf.connect("gloo", device="cpu", timeout=20)
        total = torch.tensor([float(other.rank)])
        other.all_reduce(total)
        found.append((other.rank, other.size, other.backend, total.item(), torch.get_num_threads()))
        other.close()
        assert not dist.is_initialized()
    return found


@pytest.mark.parametrize("launcher", ["torchrun", "slurm"])
def test_ranks_meet_and_meet_again(launcher: str) -> None:
    for rank, found in enumerate(ranks(2, connect_twice, fresh=True, port=_free_port(), launcher=launcher)):
        for line in found:
            assert line[:4] == (rank, 2, "gloo", 1.0)
            assert line[4] >= 1


def connect_some(comm: Communicator, port: int) -> None:
    _as_rank(comm, port, "torchrun")
    if comm.rank == 0:
        dhf.connect("gloo", device="cpu", timeout=2)


def test_a_rank_that_does_not_come() -> None:
    first, second = try_ranks(2, connect_some, fresh=True, port=_free_port())
    assert second is None
    assert first.type == "CommunicationError"
    assert "rank 0" in first.text
    assert "2 ranks" in first.text or "of 2" in first.text


def connect_nowhere(comm: Communicator, port: int) -> None:
    _as_rank(comm, port, "slurm")
    os.environ["SLURM_STEP_NODELIST"] = "no-such-host.invalid"
    dhf.connect("gloo", device="cpu", timeout=2)


def test_a_host_that_does_not_resolve() -> None:
    for outcome in try_ranks(2, connect_nowhere, fresh=True, port=_free_port()):
        assert outcome.type == "UsageError"
        assert "'no-such-host.invalid' of rank 0 does not resolve; set MASTER_ADDR" in outcome.text


def connect_within(comm: Communicator, port: int) -> tuple[int, int, bool]:
    """A user's own default group stays when dhf leaves it."""
    _as_rank(comm, port, "torchrun")
    dist.init_process_group("gloo")
    other = dhf.connect("gloo", device="cpu", timeout=20)
    found = other.rank, other.size
    other.close()
    kept = dist.is_initialized()
    dist.destroy_process_group()
    return *found, kept


def test_a_group_of_the_users_own_is_used_and_left_alone() -> None:
    assert ranks(2, connect_within, fresh=True, port=_free_port()) == [(0, 2, True), (1, 2, True)]


def follow_the_users_group(comm: Communicator) -> tuple[int, int, str]:
    mine = dhf.connect(device="cpu")
    try:
        return mine.rank, mine.size, mine.backend
    finally:
        mine.close()


def test_a_group_that_is_open_already_is_followed() -> None:
    # the test's ranks have a default group, and no variables of any launcher
    assert ranks(2, follow_the_users_group) == [(0, 2, "gloo"), (1, 2, "gloo")]
