"""Globalisation: choose among CG's iterates, then shorten the step until the objective falls enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

__all__ = ["HALVINGS", "armijo", "backtrack"]

HALVINGS = tuple(0.5**j for j in range(20))


def backtrack(count: int, value: Callable[[int], float]) -> tuple[int, float]:
    """Walk back from the last of ``count`` CG iterates while the objective falls; its index and value.

    Source: Martens (2010), section 4.6.
    """
    best, f_best = count - 1, value(count - 1)
    for i in range(count - 2, -1, -1):
        f = value(i)
        if math.isfinite(f_best) and not f < f_best:
            break
        best, f_best = i, f
    return best, f_best


def armijo(
    value: Callable[[float], float],
    f0: float,
    slope: float,
    *,
    f1: float | None = None,
    tolerance: float = 0.0,
    sufficient: float = 1e-2,
    lengths: Sequence[float] = HALVINGS,
) -> tuple[float, float]:
    """The first step length s with ``f(s) ≤ f0 + sufficient·s·slope + tolerance``, and its value.

    Args:
        value: s -> f(θ + s d).
        f0: f at s = 0.
        slope: ``gᵀd``, negative.
        f1: f at s = 1 where it is known already.
        tolerance: Rounding allowed for.
        sufficient: Share of the linear decrease that is asked for.
        lengths: Step lengths to try, in order.

    Returns:
        ``(s, f(s))``, or ``(0.0, f0)`` if none decreases f enough. Near convergence a step that changes f by no more than
        rounding is taken as long as it does not raise it.

    Source: Armijo (1966).
    """
    for s in lengths:
        f = f1 if s == 1.0 and f1 is not None else value(s)
        if math.isfinite(f) and f <= f0 and f <= f0 + sufficient * s * slope + tolerance:
            return s, f
    return 0.0, f0
