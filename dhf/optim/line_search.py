"""Globalisation: choose among CG's iterates, then shorten the step until the objective falls enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

__all__ = ["HALVINGS", "armijo", "backtrack", "logarithmic_grid"]

HALVINGS = tuple(0.5**j for j in range(20))


def backtrack(
    count: int, value: Callable[[int], float], *, satisfied: Callable[[float], bool] = lambda f: False
) -> tuple[int, float]:
    """Walk back from the last of ``count`` CG iterates while the objective falls; its index and value.

    Args:
        count: Iterates, the last one first to be tried.
        value: The objective at an iterate.
        satisfied: Whether the last iterate's value is so good that no other need be looked at.

    Source: Martens (2010), section 4.6; there the iterate before the last is always looked at.
    """
    best, f_best = count - 1, value(count - 1)
    if satisfied(f_best):
        return best, f_best
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
    slack: float = 0.0,
    sufficient: float = 1e-2,
    lengths: Sequence[float] = HALVINGS,
) -> tuple[float, float]:
    """The first step length s with ``f(s) ≤ f0 + sufficient·s·slope + tolerance``, and its value.

    Args:
        value: s -> f(θ + s d).
        f0: f at s = 0.
        slope: ``gᵀd``, negative.
        f1: f at s = 1 where it is known already.
        tolerance: Rounding allowed for in the decrease.
        slack: Rounding by which f may even rise.
        sufficient: Share of the linear decrease that is asked for.
        lengths: Step lengths to try, in order.

    Returns:
        ``(s, f(s))``, or ``(0.0, f0)`` if none decreases f enough. Near convergence a step that changes f by no more than
        rounding is taken as long as it does not raise it by more than ``slack``.

    Source: Armijo (1966).
    """
    for s in lengths:
        f = f1 if s == 1.0 and f1 is not None else value(s)
        if math.isfinite(f) and f <= f0 + slack and f <= f0 + sufficient * s * slope + tolerance:
            return s, f
    return 0.0, f0


def logarithmic_grid(
    value: Callable[[float], float], f0: float, f1: float, *, longest: float = 16.0, shortest: float = 2.0**-30
) -> tuple[float, float]:
    """The best step length among powers of two, walked from 1 as long as f falls: upwards if 2 is better, else downwards.

    Args:
        value: s -> f(θ + s d).
        f0: f at s = 0.
        f1: f at s = 1.
        longest, shortest: The ends of the grid.

    Returns:
        ``(s, f(s))`` with ``f(s) < f0``, or ``(0.0, f0)``.

    Source: the logarithmic grid of Müller & Zeinhofer, "Achieving high accuracy with PINNs via energy natural gradient
    descent" (2023); there all of it is tried.
    """
    factor, s, f = 2.0, 1.0, f1
    beyond = value(2.0) if math.isfinite(f1) else math.inf
    if not beyond < f:
        factor, beyond = 0.5, value(0.5)
    while True:
        falls = math.isfinite(beyond) and (beyond < f or not math.isfinite(f))
        # below f0 the walk ends where f no longer falls; above it goes on to shorter steps
        if not falls and math.isfinite(f) and f < f0:
            break
        s, f = s * factor, beyond
        if not shortest <= s * factor <= longest:
            break
        beyond = value(s * factor)
    return (s, f) if math.isfinite(f) and f < f0 else (0.0, f0)
