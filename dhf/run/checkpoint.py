"""Checkpoints: one folder each, complete or absent; the newest is named in LATEST, and never written over.

    checkpoints/step-25/state.pt          tensors and plain values, no pickled code
    checkpoints/step-25/manifest.json     the step, and the checksum of state.pt
    checkpoints/LATEST                    step-25

A folder is written under another name, synced, and renamed; LATEST is replaced in one step after that. So a run that is
killed at any moment leaves LATEST naming a whole checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dhf.errors import UsageError
from dhf.run.directory import write_atomically

__all__ = ["Found", "decode", "find", "forget_after", "load_module", "read", "save"]

Found = tuple[Path, bytes]


def save(folder: Path, step: int, state: Mapping[str, Any], *, keep: int = 3) -> Path:
    """Write ``step-N``, point LATEST at it, and remove all but the newest ``keep``; a whole ``step-N`` that is there stays.

    Args:
        folder: The run's ``checkpoints`` folder.
        step: Steps done.
        state: Tensors, numbers, strings, and nests of them.
        keep: How many checkpoints stay, this one included.

    Raises:
        OSError: If it cannot be written; what was there before is whole.
    """
    _sweep(folder)
    final, temporary = folder / f"step-{step}", folder / f".step-{step}.{os.getpid()}"
    if _is_whole(final):
        write_atomically(folder / "LATEST", final.name + "\n")
        return final
    try:
        temporary.mkdir()
        content = _encode(state)
        with (temporary / "state.pt").open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        digest = hashlib.sha256(content).hexdigest()
        write_atomically(temporary / "manifest.json", json.dumps({"step": step, "state.pt": {"sha256": digest}}) + "\n")
        _sync(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(folder)
    write_atomically(folder / "LATEST", final.name + "\n")
    _sync(folder)
    for path in _by_step(folder)[:-keep]:
        if path != final:
            shutil.rmtree(path, ignore_errors=True)
    return final


def find(path: Path) -> tuple[Found | None, list[str]]:
    """The newest whole checkpoint of a run directory or ``checkpoints`` folder, or the checkpoint that ``path`` is.

    Returns:
        The checkpoint's folder and the bytes of its state, or None; and one line for each newer one that is damaged.

    Raises:
        UsageError: If ``path`` itself is a checkpoint, and damaged.
    """
    if (path / "state.pt").is_file() or (path / "manifest.json").is_file():
        return (path, read(path)), []
    damaged: list[str] = []
    for candidate in _candidates(path if (path / "LATEST").exists() else path / "checkpoints"):
        try:
            return (candidate, read(candidate)), damaged
        except UsageError as error:
            damaged.append(str(error))
    return None, damaged


def read(path: Path) -> bytes:
    """The bytes of a checkpoint's state, as its manifest knows them.

    Raises:
        UsageError: If a file is missing, or the checksum is not that of the manifest.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        content = (path / "state.pt").read_bytes()
        expected = manifest["state.pt"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"checkpoint {path} cannot be read: {type(error).__name__}: {error}") from None
    if hashlib.sha256(content).hexdigest() != expected:
        raise UsageError(
            f"checkpoint {path} is damaged: state.pt does not have the checksum of its manifest; resume from another"
        )
    return content


def decode(content: bytes) -> dict[str, Any]:
    """The state in a checkpoint's bytes; only tensors and plain values are unpickled.

    Raises:
        UsageError: If the bytes hold anything else.
    """
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(f"the checkpoint's state cannot be loaded: {str(error).splitlines()[0]}") from None


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


def forget_after(folder: Path, step: int) -> list[str]:
    """Remove the checkpoints past a step that a run goes on from, and tell which; LATEST names that step's, if it is here."""
    kept = folder / f"step-{step}"
    if kept.is_dir():
        write_atomically(folder / "LATEST", kept.name + "\n")
    later = [path for path in _by_step(folder) if _step(path) > step]
    for path in later:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in later]


def _is_whole(path: Path) -> bool:
    try:
        return bool(read(path))
    except UsageError:
        return False


def _encode(state: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def _candidates(folder: Path) -> list[Path]:
    """The checkpoints of a folder: the one LATEST names, then the others from the newest down."""
    newest_first = _by_step(folder)[::-1]
    with contextlib.suppress(OSError, UnicodeDecodeError):
        named = folder / (folder / "LATEST").read_text().strip()
        return [named, *(path for path in newest_first if path != named)]
    return newest_first


def _by_step(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if p.name[5:].isdigit()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.partition("-")[2])


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed while writing have left."""
    for pattern in (".step-*", ".LATEST.*"):
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
