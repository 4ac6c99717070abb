"""Small files of images in MNIST's form."""

import gzip
import struct
from pathlib import Path

import numpy as np

__all__ = ["encoded", "write_images"]


def encoded(images: np.ndarray, magic: int = 0x803) -> bytes:
    """An IDX file of bytes in three dimensions."""
    return struct.pack(">IIII", magic, *images.shape) + images.astype(np.uint8).tobytes()


def write_images(path: Path, images: np.ndarray) -> None:
    """Write an IDX file, compressed if its name ends in .gz."""
    data = encoded(images)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
