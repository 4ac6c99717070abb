"""MNIST: the deep autoencoder of handwritten digits, on the IDX files that the user has; nothing is downloaded."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dhf.errors import UsageError
from dhf.problems.autoencoder import autoencoder_problem
from dhf.problems.problem import Problem

__all__ = ["autoencoder", "read_images"]

_SIDE = 28
_WIDTHS = (_SIDE * _SIDE, 1000, 500, 250, 30, 250, 500, 1000, _SIDE * _SIDE)
_TRAINING, _HELD_OUT = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"
_MAGIC = 0x803  # unsigned bytes in three dimensions
_HEADER = struct.Struct(">IIII")


def autoencoder(folder: str, connections: int = 15) -> Problem:
    """A deep autoencoder of MNIST, 784-1000-500-250-30-250-500-1000-784 with sigmoid hidden units.

    Loss, metric and picture are those of :func:`~dhf.problems.autoencoder.autoencoder_problem`.

    Args:
        folder: Holds ``train-images-idx3-ubyte`` and, as held-out images if it is there, ``t10k-images-idx3-ubyte``; either
            as it is or with ``.gz``. The labels are not needed.
        connections: Incoming weights per unit that are not zero at the start.

    Raises:
        UsageError: If a file is missing or is not what its name says, or an option is out of range.

    Source: Hinton & Salakhutdinov (2006); Martens (2010).
    """
    place = Path(str(folder)).expanduser()
    training, held_out = _find(place, _TRAINING), _find(place, _HELD_OUT)
    if training is None:
        where = "which is not a folder" if not place.is_dir() else "where neither is"
        raise UsageError(
            f"mnist-autoencoder needs {_TRAINING} or {_TRAINING}.gz in {str(place)!r}, {where}; name the folder that holds "
            f"MNIST's files by --options.folder ({_HELD_OUT} or {_HELD_OUT}.gz there is used if found)"
        )
    validation = None if held_out is None else read_images(held_out)
    return autoencoder_problem(_WIDTHS, read_images(training), connections, validation=validation)


def read_images(path: Path) -> Tensor:
    """The images of an IDX file, with ``.gz`` or without: float32 in [0, 1], shape (N, 784), row by row.

    Raises:
        UsageError: If the file cannot be read, or does not hold images of 28x28 bytes, as many as it says.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read: {error}; copy the file again") from error
    if len(data) < _HEADER.size:
        raise UsageError(f"{path} holds {len(data)} bytes, less than the header of an IDX file; copy it again")
    magic, number, rows, columns = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise UsageError(
            f"{path} starts with the magic number {magic:#010x}, not {_MAGIC:#010x} of images in IDX form; "
            "labels or another format have that name"
        )
    if number == 0 or (rows, columns) != (_SIDE, _SIDE):
        raise UsageError(f"{path} says that it holds {number} images of {rows}x{columns}; MNIST's are 28x28")
    expected, found = number * rows * columns, len(data) - _HEADER.size
    if found != expected:
        raise UsageError(
            f"{path} says that it holds {number} images, {expected} bytes, and holds {found}; copy the file again"
        )
    pixels = np.frombuffer(data, np.uint8, offset=_HEADER.size).astype(np.float32)
    return torch.from_numpy(pixels).div_(255).view(number, rows * columns)


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
