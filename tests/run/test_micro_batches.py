"""Micro-batch sizes that are left to measurement: chosen once, alike on all ranks, and written down."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dhf.comm import Communicator
from dhf.coordinator import Coordinator
from dhf.run import micro_batches
from dhf.run.assembly import assemble
from dhf.run.config import Config, parse
from dhf.run.micro_batches import choose_size, settled, written_size
from dhf.run.schedule import Phase
from dhf.train import main
from tests.ranks import ranks

FLAGS = ("--problem", "digits-autoencoder", "--dtype", "float64", "--micro-batch-size", "auto")


def choose(comm: Communicator, costs: dict[int, float], **settings: Any) -> tuple[int, str]:
    """The choice where a micro-batch of a size takes the given seconds on rank 0, and twice as many on others."""
    config = Config(problem="logistic", steps=1, micro_batch_size="auto", **settings)
    coordinator = Coordinator(comm)
    parts = assemble(Phase(1, 0, config, 1, None), [], comm, coordinator)
    before, asked = micro_batches._measure, []

    def measure(objective: Any, train: Any, step: int, size: int, build: Any) -> Any:
        asked.append(size)
        found = before(objective, train, step, size, build)
        return dataclasses.replace(found, seconds=costs[size] * (1 + comm.rank) if found.samples else 0.0)

    micro_batches._measure = measure
    try:
        size, note = choose_size(parts, coordinator, 0)
    finally:
        micro_batches._measure = before
    assert asked == [32 * 2**i for i in range(len(asked))] or asked[-1] == max(parts.train.sizes())
    return size, note


@pytest.mark.parametrize("size", [1, 2, 3])
def test_sizes_grow_while_samples_become_faster(size: int) -> None:
    costs = {32: 1.0, 64: 1.5, 128: 2.5, 256: 4.9, 512: 8.0}
    for chosen, note in ranks(size, choose, costs=costs):
        assert chosen == 128
        assert note.startswith("micro-batch size 128, the fastest: ")
        assert note.endswith(" at 32")


def test_the_whole_share_is_the_largest_size() -> None:
    costs = {32 * 2**i: 1.0 for i in range(20)} | dict.fromkeys(range(3000), 1.0)
    found = ranks(2, choose, costs=costs, batch_size=101)
    assert [chosen for chosen, _ in found] == [51, 51]


def test_what_does_not_fit_on_one_rank_is_taken_on_none() -> None:
    costs = dict.fromkeys(range(3000), 1.0)
    (full, _), _ = ranks(2, choose, costs=costs, batch_size=1000)
    found = ranks(2, choose, costs=costs, batch_size=1000, retain=20_000)
    assert full == 500
    assert len({chosen for chosen, _ in found}) == 1
    assert found[0][0] < 500
    assert "the largest that fits" in found[0][1]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``run(flag, ...)`` trains in one process; its directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def start(*flags: str, directory: str = "run") -> Path:
        assert main([*FLAGS, "--run-dir", directory, *flags]) == 0
        return Path(directory)

    yield start
    torch.set_flush_denormal(False)


def losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss_after"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_takes_the_size_of_its_checkpoint(run: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("dhf.run.trainer.choose_size", lambda *_: (700, "micro-batch size 700"))
    whole = run("--steps", "4", directory="whole")
    parts = run("--steps", "2", directory="parts")
    assert yaml.safe_load((parts / "config.yaml").read_text())["micro_batch_size"] == 700
    assert "micro-batch size 700" in capsys.readouterr().out
    monkeypatch.setattr("dhf.run.trainer.choose_size", lambda *_: (300, "another"))
    run("--steps", "4", "--resume", "auto", directory="parts")
    out = capsys.readouterr().out
    assert "another" not in out
    assert "settings that the checkpoint was not written with" not in out
    assert losses(parts) == losses(whole)
    fixed = run("--steps", "4", "--micro-batch-size", "700", directory="fixed")
    assert losses(fixed) == losses(whole)


def test_each_phase_has_a_size_of_its_own(run: Any) -> None:
    phases = "[{optimizer: adam, steps: 1, batch_size: 100}, {steps: 1, micro_batch_size: 600}, {steps: 1}]"
    written = yaml.safe_load((run("--phases", phases) / "config.yaml").read_text())
    first, second, third = (phase["micro_batch_size"] for phase in written["phases"])
    assert second == 600
    assert 32 <= first <= 100
    assert 32 <= third <= 1797


def test_sizes_in_configurations() -> None:
    assert settled(Config(micro_batch_size="auto"), {1: 64}).micro_batch_size == 64
    config = parse(["--micro-batch-size", "auto", "--phases", "[{steps: 3}, {steps: 4, micro_batch_size: 5}]"])
    assert [phase.get("micro_batch_size") for phase in settled(config, {1: 64}).phases] == [64, 5]
    assert written_size({"micro_batch_size": 7, "phases": []}, 1) == 7
    assert written_size({"micro_batch_size": "auto", "phases": [{"micro_batch_size": 9}, {}]}, 1) == 9
    assert written_size({"micro_batch_size": "auto", "phases": [{"micro_batch_size": 9}, {}]}, 2) is None
    assert written_size(None, 1) is None
