"""Mpi: sums, copies, objects, and ranks that do not come, between processes of a real mpiexec; and what is refused without one.

Each start of ranks runs this file as a program, which makes all checks and writes what came out, for the tests to judge.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dhf
from dhf.comm import Mpi
from dhf.comm.mpi import check_size, load
from tests.launched import BOUND
from tests.mpis import MPIS, starts, tidy  # noqa: F401  (tidy is a fixture)

CPU = torch.device("cpu")
PLAIN = (torch.float32, torch.float64, torch.int64)
HALF = (torch.bfloat16, torch.float16)
NUMBERS = (1, 1001, 70_001)  # MPI sums short and long buffers in different ways
LATE = {3: [0], 4: [1, 3]}  # by the number of ranks: those that come to no barrier in time
ROOT = Path(__file__).parents[2]


# what the ranks do


def talk(comm: Mpi) -> dict[str, Any]:
    return {
        "place": [comm.rank, comm.size, comm.local_rank, comm.local_size],
        "sums": {str(dtype): summed(comm, dtype) for dtype in PLAIN},
        "half": {str(dtype): sum_of_half(comm, dtype) for dtype in HALF},
        "bits": [bits_of_sum(comm, number) for number in NUMBERS],
        "started": started(comm),
        "scattered": {str(dtype): scattered(comm, dtype) for dtype in (*PLAIN, torch.bfloat16)},
        "gathered": {str(dtype): gathered(comm, dtype) for dtype in (*PLAIN, torch.uint8, torch.float16)},
        "copies": {str(dtype): copies(comm, dtype) for dtype in (*PLAIN, torch.uint8, torch.bfloat16)},
        "objects": comm.gather_objects({"rank": comm.rank, "text": "ä" * (comm.rank * 5000)}),
        "nothing": comm.gather_objects(None),
        "shapes": shapes(comm),
        "parameter": parameter(comm),
        "refused": refused(comm),
        "counted": counted(comm),
        "several": several(comm),
    }


def summed(comm: Mpi, dtype: torch.dtype) -> list[float]:
    total = torch.arange(3, dtype=dtype) + comm.rank
    comm.all_reduce(total)
    return total.tolist()


def sum_of_half(comm: Mpi, dtype: torch.dtype) -> float:
    """A number so large that adding one to it is lost to rounding, and a one from each other rank."""
    total = torch.tensor([large(dtype) if comm.rank == 0 else 1.0]).to(dtype)
    comm.all_reduce(total)
    return total.item()


def large(dtype: torch.dtype) -> float:
    return 2 / torch.finfo(dtype).eps


def bits_of_sum(comm: Mpi, number: int) -> tuple[str, float]:
    """The bits of a sum, and how far it is from the sum in float64."""
    parts = [torch.randn(number, generator=torch.Generator().manual_seed(r)) for r in range(comm.size)]
    total = parts[comm.rank].clone()
    comm.all_reduce(total)
    error = (total.double() - torch.stack(parts).double().sum(0)).abs().max().item()
    return hashlib.sha256(total.numpy().tobytes()).hexdigest(), error


def started(comm: Mpi) -> list[list[float]]:
    """Two sums under way at once, waited for in the other order."""
    buffers = [torch.full((2,), float(comm.rank + 1)), torch.full((3,), 10.0 * comm.rank)]
    pending = [comm.start_all_reduce(buffer) for buffer in buffers]
    for one in reversed(pending):
        one.wait()
    return [buffer.tolist() for buffer in buffers]


def scattered(comm: Mpi, dtype: torch.dtype) -> list[float]:
    out = torch.full((2,), -1, dtype=dtype)
    comm.reduce_scatter(torch.arange(2 * comm.size, dtype=dtype) + comm.rank, out)
    return out.tolist()


def gathered(comm: Mpi, dtype: torch.dtype) -> list[float]:
    out = torch.zeros(2 * comm.size, dtype=dtype)
    comm.all_gather(torch.tensor([comm.rank, 100], dtype=dtype), out)
    return out.tolist()


def copies(comm: Mpi, dtype: torch.dtype) -> list[list[float]]:
    """What each rank as the source has given this one."""
    found = []
    for source in range(comm.size):
        buffer = torch.tensor([comm.rank, 7], dtype=dtype)
        comm.broadcast(buffer, source=source)
        found.append(buffer.tolist())
    return found


def shapes(comm: Mpi) -> list[Any]:
    """No dimension, no element, two dimensions, and rows of a larger tensor."""
    tensors = [torch.tensor(2.0), torch.zeros(0), torch.ones(2, 3), torch.ones(4, 2)[1:3]]
    for tensor in tensors:
        comm.all_reduce(tensor)
    return [tensor.tolist() for tensor in tensors]


def parameter(comm: Mpi) -> list[float]:
    """A leaf that requires gradients is written to in place."""
    weight = nn.Parameter(torch.full((2,), float(comm.rank)))
    comm.broadcast(weight, source=comm.size - 1)
    return weight.tolist()


def refused(comm: Mpi) -> list[str]:
    """What every collective says of a buffer with gaps."""
    gaps, whole = torch.ones(4 * comm.size)[::2], torch.ones(2 * comm.size)
    calls = (
        lambda: comm.all_reduce(gaps),
        lambda: comm.start_all_reduce(gaps),
        lambda: comm.broadcast(gaps),
        lambda: comm.reduce_scatter(gaps, whole),
        lambda: comm.all_gather(whole, gaps),
    )
    found = []
    for call in calls:
        try:
            call()
        except ValueError as error:
            found.append(str(error))
    return found


def counted(comm: Mpi) -> int:
    before = comm.collectives
    comm.gather_objects(0)
    comm.barrier()
    comm.all_reduce(torch.ones(1))
    comm.broadcast(torch.ones(1))
    return comm.collectives - before


def several(comm: Mpi) -> list[float]:
    """Two communicators in turn, and the first one once the second has closed, twice."""
    second, found = Mpi(CPU, timeout=20), []
    for other in (comm, second, comm, second):
        one = torch.ones(1)
        other.all_reduce(one)
        found.append(one.item())
    second.close()
    second.close()
    one = torch.ones(1)
    comm.all_reduce(one)
    return [*found, one.item()]


def miss(comm: Mpi, folder: Path) -> dict[str, Any]:
    """A barrier to which some ranks do not come. The first that waits gives up after a second, the others would wait longer."""
    late = LATE[comm.size]
    first = min(set(range(comm.size)) - set(late))
    if comm.rank in late:
        wait_for([folder / f"missed.{r}" for r in range(comm.size) if r not in late])
    began = time.monotonic()
    error = told(lambda: comm.barrier(timeout=1.0 if comm.rank == first else BOUND))
    if comm.rank in late and error is None:  # the others had come to that barrier, but go no further
        error = told(lambda: comm.barrier(timeout=BOUND))
    took = time.monotonic() - began
    (folder / f"missed.{comm.rank}").touch()
    again = told(lambda: comm.all_reduce(torch.ones(1))), told(lambda: comm.gather_objects(1))
    comm.close()
    return {"error": error, "took": took, "again": again}


def told(call: Any) -> dict[str, Any] | None:
    try:
        call()
    except dhf.CommunicationError as error:
        return {"text": str(error), "missing": error.missing, "survivors": error.survivors}
    return None


def wait_for(paths: list[Path]) -> None:
    end = time.monotonic() + BOUND / 2
    while not all(path.exists() for path in paths) and time.monotonic() < end:
        time.sleep(0.02)


def main(folder: Path) -> None:
    comm = Mpi(CPU, timeout=60)
    found = talk(comm)
    if comm.size in LATE:
        found["missed"] = miss(comm, folder)
    (folder / f"{comm.rank}.part").write_text(json.dumps(found))
    (folder / f"{comm.rank}.part").rename(folder / f"{comm.rank}.json")
    # a rank that has lost another ends the job as it ends
    wait_for([folder / f"{r}.json" for r in range(comm.size)])
    if comm.size not in LATE:
        comm.close()


# what must have come out


class Ranks(list):
    """What each rank has found, and the launcher's exit code."""

    def __init__(self, start: list[str], size: int, folder: Path) -> None:
        done = subprocess.run(
            [*start, sys.executable, "-m", "tests.comm.test_mpi", str(folder)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=BOUND,
            check=False,
        )
        assert len(list(folder.glob("*.json"))) == size, done.stdout + done.stderr
        super().__init__(json.loads((folder / f"{r}.json").read_text()) for r in range(size))
        self.code = done.returncode

    def every(self, name: str) -> Any:
        """What all ranks have found alike."""
        first, *others = (found[name] for found in self)
        assert all(other == first for other in others)
        return first


@pytest.fixture(
    scope="module", params=[(mpi, size) for mpi in MPIS for size in (1, 2, 3, 4)], ids=lambda p: f"{p[0]}-{p[1]}"
)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tidy: None) -> Ranks:  # noqa: F811
    mpi, size = request.param
    return Ranks(starts(mpi, size), size, tmp_path_factory.mktemp(f"{mpi}-{size}"))


pytestmark = [pytest.mark.launch, pytest.mark.usefixtures("tidy")]


def test_every_rank_knows_its_place(ranks: Ranks) -> None:
    size = len(ranks)
    assert [found["place"] for found in ranks] == [[r, size, r, size] for r in range(size)]


def test_sums(ranks: Ranks) -> None:
    size = len(ranks)
    expected = [size * i + size * (size - 1) // 2 for i in range(3)]
    assert ranks.every("sums") == {str(dtype): expected for dtype in PLAIN}
    assert ranks.every("started") == [[size * (size + 1) / 2] * 2, [10 * size * (size - 1) / 2] * 3]
    assert ranks.every("shapes") == [2 * size, [], [[size] * 3] * 2, [[size] * 2] * 2]


def test_half_precision_is_summed_in_single_and_rounded_once(ranks: Ranks) -> None:
    expected = {str(dtype): torch.tensor(large(dtype) + len(ranks) - 1).to(dtype).item() for dtype in HALF}
    assert ranks.every("half") == expected
    if len(ranks) > 2:
        assert all(expected[str(dtype)] > large(dtype) for dtype in HALF)


def test_every_rank_receives_the_same_bits(ranks: Ranks) -> None:
    for _, error in ranks.every("bits"):
        assert error < 1e-5


def test_each_rank_receives_its_piece_of_a_sum(ranks: Ranks) -> None:
    size = len(ranks)
    for rank, found in enumerate(ranks):
        piece = [size * i + size * (size - 1) // 2 for i in (2 * rank, 2 * rank + 1)]
        assert all(out == piece for out in found["scattered"].values())


def test_pieces_are_gathered_in_rank_order(ranks: Ranks) -> None:
    expected = [number for r in range(len(ranks)) for number in (r, 100)]
    assert all(found == expected for found in ranks.every("gathered").values())


def test_copies_of_each_source(ranks: Ranks) -> None:
    expected = [[source, 7] for source in range(len(ranks))]
    assert all(found == expected for found in ranks.every("copies").values())
    assert ranks.every("parameter") == [len(ranks) - 1] * 2


def test_objects_of_uneven_sizes(ranks: Ranks) -> None:
    assert ranks.every("objects") == [{"rank": r, "text": "ä" * (r * 5000)} for r in range(len(ranks))]
    assert ranks.every("nothing") == [None] * len(ranks)


def test_a_buffer_with_gaps_is_refused_before_anything_is_sent(ranks: Ranks) -> None:
    assert ranks.every("refused") == ["a collective needs a contiguous tensor"] * 5


def test_tensor_collectives_alone_are_counted(ranks: Ranks) -> None:
    assert ranks.every("counted") == 2


def test_several_communicators_in_one_process(ranks: Ranks) -> None:
    assert ranks.every("several") == [len(ranks)] * 5


def test_ranks_that_do_not_come_are_named(ranks: Ranks) -> None:
    size = len(ranks)
    if size not in LATE:
        assert ranks.code == 0
        return
    late = LATE[size]
    there = [r for r in range(size) if r not in late]
    names = f"rank {late[0]}" if len(late) == 1 else f"ranks {', '.join(map(str, late))}"
    for rank in there:
        error = ranks[rank]["missed"]["error"]
        assert (error["missing"], error["survivors"]) == (late, there)
        assert error["text"].startswith(f"{names} missing in barrier: stopped, or busy for longer than the timeout of ")
    assert "timeout of 1 s" in ranks[there[0]]["missed"]["error"]["text"]
    for found in ranks:  # also one that comes later, and one that would have waited longer
        assert found["missed"]["took"] < BOUND / 2
        assert found["missed"]["again"] == [found["missed"]["error"]] * 2
    assert ranks.code == 5


def test_a_rank_that_comes_too_late_learns_that_the_others_have_given_up(ranks: Ranks) -> None:
    for rank in LATE.get(len(ranks), []):
        error = ranks[rank]["missed"]["error"]
        assert "the ranks lost one another in barrier, though all still run" in error["text"]
        assert error["survivors"] == list(range(len(ranks)))


# a world of another size than was started


@pytest.mark.parametrize(
    ("environment", "size", "words"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4"}, 1, ("SLURM_STEP_NUM_TASKS=4", "as 4 separate jobs", "srun --mpi=pmi2")),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 1, ("OMPI_COMM_WORLD_SIZE=4", "size 1", "use the mpirun of the MPI library")),
        ({"PMI_SIZE": "6"}, 2, ("PMI_SIZE=6", "size 2", "as 3 separate jobs", "use the mpirun of the MPI library")),
        # mpirun in a SLURM job has started daemons by srun, whose variables the ranks see
        ({"PMI_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"}, 1, ("PMI_SIZE=4", "use the mpirun of the MPI library")),
    ],
)
def test_another_size_than_was_started(environment: dict[str, str], size: int, words: tuple[str, ...]) -> None:
    with pytest.raises(dhf.UsageError) as raised:
        check_size(size, environment)
    for part in words:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"PMI_SIZE": "4"},
        {"OMPI_COMM_WORLD_SIZE": "4"},
        {"SLURM_STEP_NUM_TASKS": "4"},
        {"OMPI_COMM_WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"},
        {"SLURM_NTASKS": "8"},
    ],
)
def test_the_size_that_was_started(environment: dict[str, str]) -> None:
    check_size(4, environment)


def test_the_mpiexec_of_another_mpi_is_named(tmp_path: Path) -> None:
    """Each rank finds itself alone in its world."""
    starts("openmpi", 4)
    done = subprocess.run(
        [*starts("mpich", 4), sys.executable, "-m", "dhf.train", "--run-dir", "run"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MPI4PY_MPIABI": "openmpi"},
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "started 4 processes (PMI_SIZE=4), but MPI's world has size 1 in each" in errors[0]
    assert "they would run as 4 separate jobs; use the mpirun of the MPI library that mpi4py uses" in errors[0]
    assert not (tmp_path / "run").exists()


# mpi4py, or its library, is missing


def test_mpi4py_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(dhf.UsageError, match=r"--backend mpi needs mpi4py: pip install 'dhf\[mpi\]'"):
        load()


def test_the_mpi_library_is_missing(tmp_path: Path) -> None:
    starts("mpich", 1)
    done = subprocess.run(
        [sys.executable, "-m", "dhf.train", "--backend", "mpi", "--run-dir", "run"],
        cwd=tmp_path,
        env={**os.environ, "MPI4PY_LIBMPI": "/no/such/libmpi.so"},
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: mpi4py found no MPI library: ")
    assert done.stderr.rstrip().endswith("; install mpich or Open MPI")
    assert done.stderr.count("\n") == 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
