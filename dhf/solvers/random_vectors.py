"""Random vectors named by a seed and a number: the same on every rank, device and machine, one after the other or not."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["normal_vector", "sign_vector"]


def normal_vector(seed: int, number: int, like: Tensor) -> Tensor:
    """Independent standard normal numbers, of the shape, dtype and device of ``like``."""
    return torch.from_numpy(_generator(seed, number).standard_normal(like.numel())).to(like)


def sign_vector(seed: int, number: int, like: Tensor) -> Tensor:
    """Independent signs ±1, of the shape, dtype and device of ``like``."""
    signs = _generator(seed, number).integers(0, 2, like.numel(), dtype=np.int8)
    return torch.from_numpy(signs).to(like).mul_(2).sub_(1)


def _generator(seed: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed & 0xFFFFFFFFFFFFFFFF, number])
