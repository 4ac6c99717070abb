"""The doctor's look at ranks and launchers: collectives that give wrong results are found, on real ranks and with their rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dhf.comm import Serial
from dhf.doctor.collectives import try_collectives
from dhf.doctor.environment import look_around
from dhf.doctor.finding import Finding, Section, merge, of_error
from dhf.errors import RankError, UsageError
from tests.ranks import ranks


class Mangled:
    """A communicator whose sums are spoiled in one way; all else is passed on."""

    def __init__(self, comm: Any, fault: str) -> None:
        self._comm, self._fault = comm, fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def all_reduce(self, buffer: torch.Tensor) -> None:
        if self._fault == "drops NaN":
            buffer.nan_to_num_()
        self._comm.all_reduce(buffer)
        if self._fault == "rounds apart" and self._comm.rank == 1 and bool(buffer.frac().any()):
            buffer.mul_(1 + 1e-15)
        if self._fault == "forgets" and self._comm.rank == 1:
            buffer.sub_(1.0)


def collectives(comm: Any, fault: str) -> Section:
    return try_collectives(Mangled(comm, fault))


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("", []),
        ("drops NaN", ["all-reduce of NaN gives wrong results over gloo"]),
        ("rounds apart", ["all-reduce gives wrong results over gloo"]),
    ],
)
def test_the_rules_of_sums_are_checked(fault, found):
    for section in ranks(2, collectives, fault=fault):
        assert [f.what for f in section.findings] == found
        assert all(f.must_change for f in section.findings)


def test_a_wrong_sum_names_its_rank():
    for section in ranks(2, collectives, fault="forgets"):
        sums = [f for f in section.findings if f.what.startswith("the sum of")]
        assert [f.where for f in sums] == ["rank 1"] * 3


def around(comm: Any, environment: dict[str, str]) -> Section:
    return look_around(comm, environment)


def test_ranks_are_told_by_host_and_a_launcher_that_speaks_of_others_is_found():
    environment = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for section in ranks(2, around, environment=environment):
        facts = dict(section.facts)
        assert facts["ranks"] == "2 over gloo"
        assert any(
            label.startswith("on ") and text.startswith("rank 0 to 1 on cpu, 1 thread(s) each")
            for label, text in section.facts
        )
        assert [f.what for f in section.findings if f.must_change] == ["torchrun speaks of 4 ranks, and 2 have met"]


def test_one_process_in_a_job_of_many_tasks_is_noted():
    section = look_around(Serial(), {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SECRET": "x"})
    assert [f.what for f in section.findings] == ["the SLURM job has 4 tasks, and this is one process"]
    assert not any(f.must_change for f in section.findings)
    assert dict(section.facts)["variables"] == "SLURM_JOB_ID=7 SLURM_NTASKS=4"


def test_what_only_some_ranks_find_names_them():
    common, own = Finding("error", "a", "here", "mend"), Finding("error", "b", "there", "mend")
    merged = merge([Section("s", [("x", "1")], [common]), Section("s", [("x", "2")], [common, own])])
    assert merged.facts == [("x", "1")]
    assert [(f.what, f.where) for f in merged.findings] == [("a", "here"), ("b", "there (rank 1)")]


@pytest.mark.parametrize(
    ("error", "what", "where", "remedy"),
    [
        (
            UsageError("submodule 'a.b' is a SyncBatchNorm; use GroupNorm"),
            "submodule 'a.b' is a SyncBatchNorm",
            "module 'a.b'",
            "use GroupNorm",
        ),
        (
            UsageError("parameter 'w' is bfloat16; use float()"),
            "parameter 'w' is bfloat16",
            "parameter 'w'",
            "use float()",
        ),
        (UsageError("--device cuda needs a GPU"), "--device cuda needs a GPU", "--device", "mend it"),
        (RankError(1, "host", "OSError: gone"), "rank 1 (host) failed: OSError: gone", "the problem", "mend it"),
        (KeyError("x"), "KeyError: 'x'", "the problem", "mend it"),
    ],
)
def test_errors_become_findings(error, what, where, remedy):
    found = of_error(error, "the problem")
    assert (found.severity, found.what, found.where) == ("error", what, where)
    assert remedy in found.remedy
