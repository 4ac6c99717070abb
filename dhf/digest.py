"""digest(): what a batch or some samples hold, as a hash by which ranks see whether they hold the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["digest"]


def digest(value: Any) -> str:
    """A hash of 64 bits, in hexadecimal digits, of all that is held in tuples, lists and mappings of any depth.

    Args:
        value: Tensors and arrays count by their bits, numbers and texts by themselves, other objects by their type alone.
    """
    state = hashlib.blake2b(digest_size=8)

    def take(part: Any) -> None:
        if isinstance(part, Tensor):
            state.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, np.ndarray):
            state.update(np.ascontiguousarray(part).tobytes())
        elif isinstance(part, Mapping):
            for key in part:
                take(part[key])
        elif isinstance(part, (tuple, list)):
            for item in part:
                take(item)
        else:  # the text of any other object may hold its address
            plain = part is None or isinstance(part, (bool, int, float, str, bytes))
            state.update((repr(part) if plain else type(part).__qualname__).encode())

    take(value)
    return state.hexdigest()
