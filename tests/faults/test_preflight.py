"""What must be the same on all ranks and is not: named with its rank, on every rank, before any tensor is reduced."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.faults.forked import run

connect = importlib.import_module("dhf.comm.connect")  # in dhf.comm this name is the function

BOUND = 20.0


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize(
    ("differs", "words"),
    [
        ("width", "in parameter '0.weight': float64 (7, 5) there, float64 (6, 5) on rank 0"),
        ("extra", "in number of parameters: 5 there, 4 on rank 0"),
        ("samples", "in samples of the training data: 25 there, 24 on rank 0"),
        ("data", "in content of the training data: "),
    ],
)
def test_a_problem_that_is_built_otherwise_on_one_rank(tmp_path: Path, differs: str, words: str, rank: int) -> None:
    flags = ("--options.differs", differs, "--options.rank", str(rank))
    refused = run(3, tmp_path, "--steps", "2", *flags, code=2, within=BOUND)
    err = refused.said(stream="err")
    assert f"error: rank {rank} differs from rank 0 {words}" in err
    assert err.count("error:") == 1
    assert "Traceback" not in err
    assert not refused.directory.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--seed", "1"), "in --seed: 1 there, 0 on rank 0"),
        (("--damping", "2"), "in --damping: 2.0 there, not given on rank 0"),
        (("--dtype", "float32"), "in --dtype: 'float32' there, 'float64' on rank 0"),
        (("--optimizer", "adam"), "in --optimizer: 'adam' there, 'hf' on rank 0"),
    ],
)
def test_other_settings_on_one_rank(tmp_path: Path, flags: tuple[str, ...], words: str) -> None:
    refused = run(3, tmp_path, "--steps", "2", code=2, within=BOUND, flags_of=lambda rank: flags if rank == 2 else ())
    assert f"error: rank 2 differs from rank 0 {words}" in refused.said(stream="err")
    assert not refused.directory.exists()


@pytest.mark.parametrize("name", ["dhf", "torch"])
def test_another_version_on_one_rank(tmp_path: Path, name: str) -> None:
    def prepare(rank: int) -> None:
        if rank == 1:
            versions = connect._versions() | {name: "0.0.1"}
            connect._versions = lambda: versions

    refused = run(2, tmp_path, "--steps", "2", prepare=prepare, code=2, within=BOUND)
    assert f"error: rank 1 runs {name} 0.0.1 and rank 0 " in refused.said(stream="err")


def test_other_weights_on_one_rank(tmp_path: Path) -> None:
    """By one part in 10^12: same settings, same shapes, another random stream."""
    flags = ("--options.differs", "weights", "--options.rank", "1")
    refused = run(3, tmp_path, "--steps", "2", *flags, code=5, within=BOUND)
    assert "error: the parameters of rank 1 differ from those of rank 0" in refused.said(stream="err")
    assert not refused.directory.exists()
