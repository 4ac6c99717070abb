"""What may still be taken of memory, by the kernel, control groups and limits; and real memory that runs out."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dhf import memory
from dhf.byte_size import bytes_in_words, parse_bytes
from dhf.memory import available_memory, peak_memory, ran_out_of_memory, resident_memory, total_memory

CPU = torch.device("cpu")
MIB = 2**20

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's limits")


@linux
def test_numbers_of_this_machine_are_in_order() -> None:
    assert 0 < available_memory(CPU) <= total_memory(CPU)
    # the kernel adds up what threads have counted now and then
    assert 0 < 0.9 * resident_memory() <= peak_memory(CPU) < total_memory(CPU)


def groups(folder: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (folder / "own").write_text(own)
    monkeypatch.setattr(memory, "_GROUPS", folder)
    monkeypatch.setattr(memory, "_OWN_GROUPS", folder / "own")


def test_control_groups_of_version_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "job/memory.max": "1000\n",
        "job/memory.current": "900\n",
        "job/memory.stat": "anon 300\ninactive_file 250\nactive_file 350\n",
        "job/step/memory.max": "max\n",
        "job/step/memory.current": "900\n",
        "job/step/memory.stat": "inactive_file 250\n",
    }
    groups(tmp_path, monkeypatch, "0::/job/step\n", files)
    assert memory._left_in_groups() == 1000 - (900 - 250)
    assert available_memory(CPU) == 350


def test_control_groups_of_version_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/memory.usage_in_bytes": "77\n",
        "memory/job/memory.limit_in_bytes": "5000\n",
        "memory/job/memory.usage_in_bytes": "1200\n",
    }
    groups(tmp_path, monkeypatch, "8:cpu,cpuacct:/job\n4:memory:/job\n0::/\n", files)
    assert memory._left_in_groups() == 3800


def test_a_container_sees_its_own_group_at_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"memory.max": "600\n", "memory.current": "100\n", "memory.stat": "inactive_file 0\n"}
    groups(tmp_path, monkeypatch, "0::/docker/abc\n", files)
    assert memory._left_in_groups() == 500


def test_no_control_group_is_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups(tmp_path, monkeypatch, "0::/somewhere\n", {})
    assert memory._left_in_groups() == math.inf


@pytest.mark.parametrize(
    ("error", "ran_out"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:130] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (None, False),
    ],
)
def test_what_running_out_of_memory_looks_like(error: BaseException | None, ran_out: bool) -> None:
    assert ran_out_of_memory(error) is ran_out


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2**31), ("1.5 kB", 1500), ("3tib", 3 * 2**40), ("12", 12), ("12B", 12), ("1e3", 1000), ("2 gigs", None),
     ("-1", None), ("", None), ("GiB", None), ("1.2.3", None), ("1e999", None)],
)  # fmt: skip
def test_sizes_are_read(text: str, size: int | None) -> None:
    assert parse_bytes(text) == size


def test_sizes_are_written() -> None:
    assert (bytes_in_words(0), bytes_in_words(5 * MIB), bytes_in_words(2.5 * 2**30)) == (
        "0.0 MiB",
        "5.0 MiB",
        "2.5 GiB",
    )


PROGRAM = """
import json, resource, sys, warnings
from pathlib import Path
import torch, dhf
from dhf.curvature import Retention

policy, bound = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
module = torch.nn.Sequential(torch.nn.Linear(20, 150), torch.nn.Tanh(), torch.nn.Linear(150, 150), torch.nn.Tanh(),
                             torch.nn.Linear(150, 4)).double()
objective = dhf.Objective(module, torch.nn.MSELoss())
batches = [(torch.randn(1000, 20).double(), torch.randn(1000, 4).double()) for _ in range(24)]
v = torch.ones(sum(p.numel() for p in module.parameters())).double()
with dhf.Hessian(objective, batches, retain="none") as A:
    truth = A @ v
if bound:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + bound, taken + bound))
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    retention = Retention(policy)
    with dhf.Hessian(objective, batches, retain=retention) as A:
        product = A @ v
print(json.dumps({"kept": A.retained, "of": A.micro_batches, "same": torch.equal(product, truth), "rate": retention.rate,
                  "told": [str(w.message) for w in told]}))
"""


def in_bounds(policy: str, bound: int) -> dict:
    """What a process found whose address space may grow by ``bound`` bytes."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, policy, str(bound)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"MALLOC_ARENA_MAX": "1"},  # glibc may set 64 MiB apart for each thread, when they meet
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@linux
def test_auto_keeps_what_the_address_space_has_room_for() -> None:
    """24 graphs of 6 MiB or so, and room for a part of them."""
    found = in_bounds("auto", 60 * MIB)
    assert found["same"]
    assert 0 < found["kept"] < 24
    assert found["told"] == []


@linux
def test_real_memory_that_runs_out_is_made_room_for() -> None:
    found = in_bounds("all", 60 * MIB)
    assert found["same"]
    assert found["kept"] < found["of"] == 24
    assert any("ran out of memory" in text for text in found["told"])
