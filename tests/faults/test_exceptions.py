"""An exception on one rank, anywhere in a step, is one error on all ranks, at once, and what was reached is saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from dhf.run import checkpoint, saver
from dhf.run.monitor import Monitor
from tests.faults.forked import run

BOUND = 20.0  # seconds for the whole run, its start included; a hang would last for the timeout of 300 s


@pytest.mark.parametrize(
    ("place", "fault", "rank"),
    [
        ("forward", "raise", 2),
        ("product", "raise", 0),
        ("search", "raise", 1),
        ("forward", "memory", 0),
        ("search", "memory", 2),
    ],
)
def test_an_exception_on_one_rank_ends_all(tmp_path: Path, place: str, fault: str, rank: int) -> None:
    flags = ("--options.fault", fault, "--options.place", place, "--options.rank", str(rank), "--options.at", "2")
    ended = run(3, tmp_path, "--steps", "9", "--micro-batch-size", "8", *flags, code=5, within=BOUND)
    words = (
        "RuntimeError: a fault of the test" if fault == "raise" else "OutOfMemoryError: simulated: no 12 GiB left; out"
    )
    errors = [line for line in ended.said(stream="err").splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: rank {rank} (")
    assert f") failed in its micro-batch 0: {words}" in errors[0]
    assert "faulty.py" in ended.said(0, "err")  # the failing rank's traceback
    result = ended.result()
    assert (result["reason"], result["failed_rank"], result["steps"]) == ("RANK_FAILED", rank, 1)
    found, damaged = checkpoint.find(ended.directory)
    assert found is not None
    assert (found[0].name, damaged) == ("step-1", [])


def test_memory_that_runs_out_in_a_product_is_made_by_freeing_graphs(tmp_path: Path) -> None:
    flags = ("--options.fault", "memory", "--options.place", "product", "--options.rank", "1", "--options.at", "5")
    ended = run(3, tmp_path, "--steps", "5", "--micro-batch-size", "4", *flags, within=BOUND)
    warned = [line for line in ended.said(stream="err").splitlines() if line.startswith("warning: rank 1 (")]
    assert len(warned) == 1
    assert ") ran out of memory in a product: the graphs of 3 of 6 micro-batches are kept from now on" in warned[0]
    assert "graphs of 3 of 6 micro-batches are kept during a solve, the others rebuilt" in ended.said(0, "out")
    plain = run(3, tmp_path / "plain", "--steps", "5", "--micro-batch-size", "4", within=BOUND)
    for row, other in zip(ended.rows(), plain.rows(), strict=True):
        assert row["loss_after"] == pytest.approx(other["loss_after"], rel=1e-6)
        assert row["cg_iterations"] == other["cg_iterations"]


METRICS = """
import torch, dhf

def build(answer: str, at: int) -> dhf.Problem:
    x = torch.linspace(-1, 1, 12).view(-1, 1)
    calls = []

    def metrics(module):
        calls.append(1)
        if len(calls) < at:
            return {"fine": 1.0}
        if answer == "raise":
            raise KeyError("no such number")
        return {"text": {"mine": "text"}, "name": {"loss": 5.0}}[answer]

    return dhf.Problem(dhf.Objective(torch.nn.Linear(1, 1), torch.nn.MSELoss()), (x, x**2), metrics=metrics)
"""


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        ("raise", 5, ") failed: KeyError: 'no such number'"),
        ("text", 5, ") failed: ValueError: could not convert string to float: 'text'"),
        ("name", 2, "error: rank 0: the problem's metric 'loss' has the name of one of dhf's own; rename it"),
    ],
)
@pytest.mark.parametrize("at", [1, 3])
def test_metrics_that_fail_or_cannot_be_used(tmp_path: Path, answer: str, code: int, words: str, at: int) -> None:
    (tmp_path / "metrics.py").write_text(METRICS)
    flags = ("--problem", f"{tmp_path}/metrics.py:build", "--options.answer", answer, "--options.at", str(at))
    ended = run(2, tmp_path / "run", *flags, "--steps", "9", code=code, within=BOUND)
    err = ended.said(stream="err")
    assert words in err
    assert err.count("error:") == 1
    assert ended.result()["exit_code"] == code
    # the step had been taken before its metrics were asked for
    assert [row["step"] for row in ended.rows()] == list(range(1, at + 1))
    assert "no pictures" not in ended.said(stream="out")


def test_a_fault_of_dhf_itself_on_one_rank(tmp_path: Path) -> None:
    """Outside of what ranks tell one another: the others lose that rank, and what it has written of itself stands."""

    def prepare(rank: int) -> None:
        def fail(self: Monitor, *_: object) -> None:
            raise RuntimeError("a fault of dhf")

        Monitor.step = fail  # type: ignore[method-assign]

    ended = run(3, tmp_path, "--steps", "9", prepare=prepare, code=5, within=BOUND)
    assert "error: RuntimeError: a fault of dhf" in ended.said(0, "err")
    assert "error: rank 0 missing in " in ended.said(1, "err")
    result = ended.result()
    assert (result["reason"], result["failed_rank"], result["error"]) == (
        "RANK_FAILED",
        0,
        "RuntimeError: a fault of dhf",
    )
    assert checkpoint.find(ended.directory)[0] is not None


def test_an_exception_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    def prepare(rank: int) -> None:
        def fail(*_: object, **__: object) -> Path:
            raise RuntimeError("a fault of the test")

        saver.save = fail

    ended = run(3, tmp_path, "--steps", "9", "--checkpoint-every", "2", prepare=prepare, code=5, within=BOUND)
    assert "error: rank 0 (" in ended.said(0, "err")
    assert "a fault of the test" in ended.said(0, "err")
    assert ended.result()["steps"] == 2
