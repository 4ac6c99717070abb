"""Checkpoints: one folder each, complete or absent; the newest is named in LATEST."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dhf.errors import UsageError
from dhf.run.directory import write_atomically

__all__ = ["find", "load", "load_module", "save"]

_KEEP = 3


def save(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write ``step-N`` under a temporary name, sync it, rename it, and point LATEST at it; the newest three are kept.

    Args:
        folder: The run's ``checkpoints`` folder.
        step: Steps done.
        state: Tensors, numbers, strings, and nests of them.
    """
    final, temporary = folder / f"step-{step}", folder / f".step-{step}.{os.getpid()}"
    temporary.mkdir(parents=True)
    with (temporary / "state.pt").open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    digest = hashlib.sha256((temporary / "state.pt").read_bytes()).hexdigest()
    write_atomically(temporary / "manifest.json", json.dumps({"step": step, "state.pt": {"sha256": digest}}) + "\n")
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(folder)
    write_atomically(folder / "LATEST", final.name + "\n")
    older = sorted(folder.glob("step-*"), key=lambda p: int(p.name.partition("-")[2]))
    for path in older[:-_KEEP]:
        shutil.rmtree(path)
    return final


def find(path: Path) -> Path | None:
    """The newest checkpoint of a run directory or a ``checkpoints`` folder, or the checkpoint that ``path`` is; else None."""
    if (path / "state.pt").is_file():
        return path
    for folder in (path, path / "checkpoints"):
        latest = folder / "LATEST"
        if latest.is_file():
            return folder / latest.read_text().strip()
    return None


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint; only tensors and plain values are unpickled.

    Raises:
        UsageError: If a file is missing, or its checksum is not that of the manifest.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        content = (path / "state.pt").read_bytes()
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"checkpoint {path} cannot be read: {error}") from None
    if hashlib.sha256(content).hexdigest() != manifest["state.pt"]["sha256"]:
        raise UsageError(
            f"checkpoint {path} is damaged: state.pt does not have the checksum of its manifest; resume from another"
        )
    return torch.load(path / "state.pt", map_location="cpu", weights_only=True)


def load_module(module: torch.nn.Module, state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Put a checkpoint's tensors into a module.

    Raises:
        UsageError: If the model is another one; the first key or shape that differs is named.
    """
    own = module.state_dict()
    for key in [*own, *(k for k in state if k not in own)]:
        if key not in own or key not in state:
            where = "checkpoint" if key in state else "model"
            raise UsageError(f"checkpoint {path} is of another model: {key!r} is only in the {where}")
        if own[key].shape != state[key].shape:
            raise UsageError(
                f"checkpoint {path} is of another model: {key!r} has shape {tuple(state[key].shape)} there and "
                f"{tuple(own[key].shape)} here; use the same problem and options"
            )
    module.load_state_dict(dict(state))


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
