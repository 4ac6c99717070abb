"""--profile: what is counted against the communicator's own count, and what it leaves as it is."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dhf
from dhf.comm import Communicator
from dhf.coordinator import Coordinator
from dhf.optim import FirstOrder, StepReport
from dhf.optim.report import in_gradients
from dhf.phases import PHASES, Phases
from dhf.run.profile import ProfileTotals
from dhf.train import main
from tests.ranks import ranks


class Slow(dhf.Objective):
    """An objective whose outputs take their time on one rank."""

    def __init__(self, *args: Any, pause: float = 0.0) -> None:
        super().__init__(*args)
        self.pause = pause

    def outputs(self, batch: Any) -> Tensor:
        time.sleep(self.pause)
        return super().outputs(batch)


def problem(comm: Communicator, pause: float = 0.0) -> tuple[dhf.Objective, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    x, y = torch.randn(14, 4, dtype=torch.float64), torch.randint(0, 3, (14,))
    mine = slice(comm.rank * 7, comm.rank * 7 + 7) if comm.size == 2 else slice(0, 14)
    return Slow(module, torch.nn.CrossEntropyLoss(), pause=pause), [(x[mine], y[mine])]


def count_bytes(comm: Communicator) -> list[int]:
    """Have a communicator note the size of what its collectives are given."""
    sizes: list[int] = []
    for name, which in (("all_reduce", 0), ("start_all_reduce", 0), ("reduce_scatter", 0), ("all_gather", 1)):
        own = getattr(comm, name)

        def noted(*buffers: Tensor, own: Any = own, which: int = which) -> Any:
            sizes.append(buffers[which].nbytes)
            return own(*buffers)

        setattr(comm, name, noted)
    return sizes


def take_steps(comm: Communicator, **settings: Any) -> list[tuple[Any, ...]]:
    """Three steps: what was profiled, and what the communicator saw of them."""
    objective, batches = problem(comm)
    coordinator = Coordinator(comm, phases=Phases())
    sizes = count_bytes(comm)
    if "method" in settings:
        optimizer: Any = FirstOrder(objective, coordinator, **settings)
    else:
        optimizer = dhf.HessianFree(objective, coordinator=coordinator, **settings)
    seen = []
    for _ in range(3):
        sizes.clear()
        collectives = comm.collectives
        report = optimizer.step(batches)
        assert report.profile is not None
        seen.append((report, sizes.copy(), comm.collectives - collectives))
    for name in ("all_reduce", "start_all_reduce", "reduce_scatter", "all_gather"):
        delattr(comm, name)
    return seen


SETTINGS: list[dict[str, Any]] = [
    {"preconditioner": "kfac", "solver": "cg", "preset": "deep-net"},
    {"preconditioner": "nystrom", "preconditioner_rank": 4, "solver": "cg", "preset": "deep-net", "vectors": "sharded"},
    {"preconditioner": "jacobi", "solver": "cg", "preset": "deep-net", "bucket_mb": 1e-4},
    {"solver": "direct", "curvature": "ggn"},
    {"method": "adam"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["kfac", "sharded", "buckets", "direct", "adam"])
def test_collectives_and_bytes_are_those_that_the_communicator_saw(settings: dict[str, Any]) -> None:
    for seen in ranks(2, take_steps, **settings):
        for report, sizes, collectives in seen:
            assert report.profile.collectives == collectives == len(sizes)
            assert report.profile.bytes_reduced == sum(sizes) > 0


@pytest.mark.parametrize("settings", SETTINGS, ids=["kfac", "sharded", "buckets", "direct", "adam"])
def test_phases_add_up_and_none_is_told_that_was_not_entered(settings: dict[str, Any]) -> None:
    for report, _, _ in ranks(2, take_steps, **settings)[0]:
        seconds = report.profile.seconds
        assert list(seconds) == list(PHASES)
        assert all(s >= 0 for s in seconds.values())
        assert sum(seconds.values()) <= report.seconds
        assert seconds["graphs"] > 0
        assert seconds["trial"] > 0
        assert (seconds["dense"] > 0) == (settings.get("solver") == "direct")
        assert (seconds["preconditioner"] > 0) == ("preconditioner" in settings)
        assert (seconds["products"] > 0) == (report.products > 0) == ("preconditioner" in settings)
        assert report.seconds_waiting <= seconds["waiting"]


PAUSE = 0.3


def one_step(comm: Communicator, slow: int) -> dict[str, Any]:
    objective, batches = problem(comm, pause=PAUSE if comm.rank == slow else 0.0)
    coordinator = Coordinator(comm, phases=Phases())
    optimizer = dhf.HessianFree(objective, coordinator=coordinator, solver="cg", preconditioner="none")
    totals = ProfileTotals(coordinator)
    row = totals.note(optimizer.step(batches))
    return {"row": row, "summary": totals.summary(10.0), "table": totals.table(10.0)}


def test_the_rank_that_others_wait_for_is_named() -> None:
    first, second = ranks(2, one_step, slow=1)
    assert first["row"] == second["row"] | {k: first["row"][k] for k in ("collectives", "bytes_reduced")}
    for phase in ("graphs", "trial"):
        by_rank = first["row"]["phase_seconds"][phase]
        assert by_rank[1] >= PAUSE
        told = first["summary"]["phases"][phase]
        assert told["slowest_rank"] == 1
        assert told["most"] == by_rank[1]
        assert told["seconds"] == pytest.approx(sum(by_rank) / 2, abs=1e-6)
    assert first["summary"]["phases"]["waiting"]["slowest_rank"] == 0
    line = next(line for line in first["table"] if line.startswith("  gradient and its graph"))
    assert line.endswith(f"{first['summary']['phases']['graphs']['most']:.3f} (rank 1)")


PROBLEM = """
import torch, dhf

def build() -> dhf.Problem:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(12, 4, generator=generator), torch.randint(0, 3, (12,), generator=generator)
    module = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    return dhf.Problem(dhf.Objective(module, torch.nn.CrossEntropyLoss()), (x, y))
"""

CLOCKS = ("seconds", "own_seconds", "waiting_seconds", "slowest_rank", "peak_memory_mb")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dhf.run.closing.draw_run", lambda run, path: path)
    Path("mine.py").write_text(PROBLEM)

    def start(directory: str, *flags: str) -> Path:
        given = ["--problem", "mine.py:build", "--dtype", "float64", "--steps", "4", "--run-dir", directory]
        assert main([*given, *flags]) == 0
        return Path(directory)

    yield start
    torch.set_flush_denormal(False)


def rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_profiled_run_is_the_same_run(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    plain = rows(run("plain"))
    assert "profile  " not in capsys.readouterr().out
    profiled = rows(run("profiled", "--profile"))
    assert "profile  " in capsys.readouterr().out
    own = ("phase_seconds", "products_per_second", "collectives", "bytes_reduced")
    assert not set(own) & set(plain[0])
    for a, b in zip(plain, profiled, strict=True):
        left = {k: v for k, v in b.items() if k not in (*CLOCKS, *own)}
        assert left == {k: v for k, v in a.items() if k not in CLOCKS}


def test_the_closing_table_and_the_result_are_sums_of_the_metrics(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    directory = run("run", "--profile", "--solver", "cg", "--preconditioner", "none")
    written, out = rows(directory), capsys.readouterr().out
    found = json.loads((directory / "result.json").read_text())["profile"]
    for phase, words in PHASES.items():
        total = sum(row["phase_seconds"][phase][0] for row in written)
        assert found["phases"][phase]["seconds"] == pytest.approx(total, abs=1e-6)
        lines = [line for line in out.splitlines() if line.startswith(f"  {words}  ")]
        assert [line.split()[-3] for line in lines] == ([f"{total:.3f}"] if total else [])
    products, own = sum(row["products"] for row in written), found["phases"]["products"]["seconds"]
    assert found["products_per_second"] == pytest.approx(products / own, rel=1e-3)
    assert (found["collectives"], found["bytes_reduced"]) == (0, 0)  # one rank talks to nobody
    assert written[0]["products_per_second"] == pytest.approx(
        written[0]["products"] / written[0]["phase_seconds"]["products"][0], rel=1e-3
    )


class Counting(dhf.Objective):
    """Counts evaluations of the outputs."""

    evaluations = 0

    def outputs(self, batch: Any) -> Tensor:
        self.evaluations += 1
        return super().outputs(batch)


def report_of(**settings: Any) -> tuple[StepReport, int]:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    objective = Counting(module, torch.nn.CrossEntropyLoss())
    batches = [(torch.randn(12, 4, dtype=torch.float64), torch.randint(0, 3, (12,)))]
    if "method" in settings:
        optimizer: Any = FirstOrder(objective, Coordinator(dhf.connect("serial")), **settings)
    else:
        optimizer = dhf.HessianFree(objective, products="retained", **settings)
    return optimizer.step(batches), objective.evaluations


def test_costs_are_counted_in_gradients() -> None:
    """One forward pass for a value or a gradient: the outputs' own count tells how many there were."""
    for curvature, product in (("ggn", 4 / 3), ("hessian", 2.0)):
        report, evaluations = report_of(curvature=curvature, solver="cg", preconditioner="none", damping=1.0)
        assert evaluations == 1 + report.evaluations
        expected = 1 + product * report.products + (evaluations - 1) / 3
        assert report.gradient_equivalents == pytest.approx(expected, rel=1e-12)
    report, evaluations = report_of(method="lbfgs")
    gradients = evaluations - 1  # the last is a value
    assert report.evaluations == gradients > 1
    assert report.gradient_equivalents == pytest.approx(gradients + 1 / 3, rel=1e-12)
    half, _ = report_of(curvature="ggn", solver="cg", preconditioner="none", curvature_fraction=0.5)
    expected = 1.5 + 0.5 * 4 / 3 * half.products + half.evaluations / 3
    assert half.gradient_equivalents == pytest.approx(expected, rel=1e-12)
    assert in_gradients(2, 3, 6, "fisher") == pytest.approx(8.0)
