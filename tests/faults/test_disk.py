"""A process killed while it writes, and disks that are full or read-only: the old checkpoint stays, and training goes on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dhf.run import checkpoint
from tests.faults.forked import FILE, run, start

_fork = multiprocessing.get_context("fork")


def write_for_ever(folder: Path, step: int) -> None:
    while True:
        step += 1
        checkpoint.save(folder, step, {"step": step, "values": torch.full((50_000,), float(step))})


@pytest.mark.parametrize("seed", range(5))
def test_latest_always_loads_after_a_kill_at_any_moment(tmp_path: Path, seed: int) -> None:
    """Ten kills for each seed, spread over the milliseconds that one checkpoint takes."""
    checkpoint.save(tmp_path, 0, {"step": 0, "values": torch.zeros(50_000)})
    moments = random.Random(seed)
    newest = 0
    for _ in range(10):
        process = _fork.Process(target=write_for_ever, args=(tmp_path, newest))
        process.start()
        time.sleep(0.02 + moments.random() * 0.05)
        os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.join()
        named = tmp_path / (tmp_path / "LATEST").read_text().strip()
        state = checkpoint.decode(checkpoint.read(named))
        assert state["values"].eq(float(state["step"])).all()
        found, damaged = checkpoint.find(tmp_path)
        assert found is not None
        assert (found[0], damaged) == (named, [])
        newest = state["step"]
    assert newest > 1


@contextlib.contextmanager
def mounted(folder: Path, size: str) -> Iterator[Callable[..., None]]:
    """A file system of its own, of so many bytes; yields a function that mounts it again with other options."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "dhf", str(folder)], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"needs the right to mount a small tmpfs: {done.stderr.decode().strip()}")

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)

    try:
        yield remount
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


FLAGS = ("--problem", f"{FILE}:build", "--options.pause", "0.05", "--target-loss", "-1", "--checkpoint-every", "1")


def fill(folder: Path) -> Path:
    """Write until nothing more goes in."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 512)
    return filler


def test_a_disk_that_is_full_for_a_while_costs_nothing(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "2m"):
        trained = start(2, tmp_path / "disk", *FLAGS, "--steps", "40")
        trained.wait_for_step(3)
        filler = fill(tmp_path / "disk")
        time.sleep(0.6)
        found, _ = checkpoint.find(trained.directory)
        assert found is not None  # the last one that was whole before
        filler.unlink()
        assert trained.wait() == [0, 0], trained.said()
        assert [row["step"] for row in trained.rows()] == list(range(1, 41))
        found, damaged = checkpoint.find(trained.directory)
        assert found is not None
        assert (found[0].name, damaged) == ("step-40", [])


def test_a_disk_that_stays_full(tmp_path: Path) -> None:
    """What is printed goes to another disk, so that it can be read."""
    with mounted(tmp_path / "disk", "2m"):
        directory = str(tmp_path / "disk" / "run")
        trained = start(2, tmp_path / "said", *FLAGS, "--steps", "12", "--run-dir", directory)
        trained.directory = Path(directory)
        trained.wait_for_step(3)
        fill(tmp_path / "disk")
        assert trained.wait() == [5, 5], trained.said()
        said = trained.said(0, "out")
        assert "was not written (the newest is step-" in said
        assert "and is tried again: OSError: [Errno 28] No space left on device" in said
        assert "error: the last checkpoint was not written: OSError: [Errno 28]" in said
        assert "ended    not saved" in said
        found, damaged = checkpoint.find(Path(directory))
        assert found is not None
        assert int(found[0].name[5:]) >= 2  # that of step 3 may have come too late
        assert damaged == []


def test_a_disk_that_becomes_read_only(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "4m") as remount:
        directory = str(tmp_path / "disk" / "run")
        trained = start(2, tmp_path / "said", *FLAGS, "--steps", "12", "--run-dir", directory)
        trained.directory = Path(directory)
        trained.wait_for_step(3)
        for _ in range(100):  # refused while a file is open for writing
            with contextlib.suppress(subprocess.CalledProcessError):
                remount("ro")
                break
        assert trained.wait() == [5, 5], trained.said()
        assert "Read-only file system" in trained.said(0, "out")
        found, damaged = checkpoint.find(Path(directory))
        assert found is not None
        assert damaged == []


def test_a_directory_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "1m") as remount:
        remount("ro")
        refused = run(2, tmp_path / "said", *FLAGS, "--run-dir", str(tmp_path / "disk" / "run"), code=2)
        err = refused.said(0, "err")
        assert "error: " in err
        assert "the run directory " in err
        assert "cannot be written: [Errno 30] Read-only file system" in err
        assert "Traceback" not in err


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        trained = run(2, tmp_path, "--steps", "1")
    finally:
        os.umask(umask)
    for path in trained.directory.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path
