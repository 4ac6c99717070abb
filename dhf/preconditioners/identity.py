"""identity: no preconditioner, for comparison and for operators that need none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dhf.replay import SteadyMap

__all__ = ["identity"]


def identity(operator: Any, damping: float) -> Callable[[Tensor], Tensor]:
    """``r -> r``, whatever the operator and damping."""
    return SteadyMap(lambda r: r)
