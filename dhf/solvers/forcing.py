"""forcing_term: how accurately a Newton step is worth solving for, from how fast the gradient has fallen."""

from __future__ import annotations

import math

__all__ = ["forcing_term"]

_SAFEGUARD = 0.1


def forcing_term(
    gradient_norm: float,
    last_norm: float | None = None,
    last_term: float | None = None,
    *,
    gamma: float = 0.9,
    alpha: float = 2.0,
    largest: float = 0.5,
    smallest: float = 1e-6,
) -> float:
    """The relative residual η to which the linear system of an inexact Newton step should be solved.

        η_k = γ (‖g_k‖ / ‖g_{k-1}‖)^α,    not below γ η_{k-1}^α where that exceeds 0.1,    within [smallest, largest]

    Far from a solution η stays large, and little is spent on models that will not hold; near it η falls with the gradient, so
    that the steps converge with order α (for α < 2; quadratically at α = 2 where γ < 1).

    Args:
        gradient_norm: ``‖g_k‖`` of this step.
        last_norm: ``‖g_{k-1}‖`` of the step before; None for the first step, whose term is ``largest``.
        last_term: ``η_{k-1}`` that this function gave then.
        gamma: In (0, 1].
        alpha: In (1, 2]; the golden ratio ``(1 + √5) / 2`` is the other common choice.
        largest: Greatest term, and that of the first step; below 1.
        smallest: Least term, which the dtype must be able to reach; positive.

    Returns:
        η, to be given as ``rtol``. Dimensionless.

    Raises:
        ValueError: If a norm is negative or not finite, or a constant is out of range.

    Source: Eisenstat & Walker (1996), choice 2 with its safeguard; the bounds are dhf's.

    Example:
        >>> forcing_term(4.0)
        0.5
        >>> round(forcing_term(1.0, last_norm=4.0, last_term=0.3), 6)  # 0.9 / 4², for the safeguard 0.9 · 0.3² is below 0.1
        0.05625
    """
    if not (0 < gamma <= 1 and 1 < alpha <= 2 and 0 < smallest <= largest < 1):
        raise ValueError(
            "expected 0 < gamma <= 1 < alpha <= 2 and 0 < smallest <= largest < 1, got "
            f"gamma={gamma}, alpha={alpha}, smallest={smallest}, largest={largest}"
        )
    for name, norm in (("gradient_norm", gradient_norm), ("last_norm", last_norm)):
        if norm is not None and not (norm >= 0 and math.isfinite(norm)):
            raise ValueError(f"{name} must be finite and not negative, got {norm}")
    if not last_norm:
        return largest
    ratio = min(gradient_norm / last_norm, 1 / smallest)  # any ratio above 1 gives the largest term, and none overflows
    term = gamma * ratio**alpha
    floor = 0.0 if last_term is None else gamma * last_term**alpha
    if floor > _SAFEGUARD:
        term = max(term, floor)
    return min(max(term, smallest), largest)
