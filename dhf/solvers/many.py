"""solve_many: one system after the other with the same operator; what its graphs cost is paid once.

A retained graph multiplies one vector after the other as fast as several, so each column has a solve and an end of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dhf.solvers.cg import cg
from dhf.solvers.solution import Solution

__all__ = ["solve_many"]


def solve_many(
    operator: Any, B: Tensor, *, solver: Callable[..., Solution] = cg, X0: Tensor | None = None, **options: Any
) -> list[Solution]:
    """Solve ``A x = b`` for each column b of B.

    Args:
        operator: As the solver takes it.
        B: Right-hand sides, shape (n, m); the operator's dtype and device.
        solver: :func:`dhf.cg`, :func:`dhf.minres`, or another that is called as ``solver(operator, b, **options)``.
        X0: Starts, shape (n, m), for solvers that take an ``x0``.
        **options: Of the solver, such as ``rtol``, ``max_iterations`` and ``preconditioner``; the same for all columns.

    Returns:
        One Solution per column, in their order; each has its own reason, iterations and residual. A column that does not
        converge does not keep the others from being solved.

    Raises:
        ValueError: If B does not have shape (n, m), or X0 another one.
        RankError: If code failed on a rank.

    Example:
        >>> import torch
        >>> A = torch.tensor([[2.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
        >>> solutions = solve_many(A, torch.eye(2, dtype=torch.float64))
        >>> torch.stack([solution.x for solution in solutions], dim=1)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.2500]], dtype=torch.float64)
    """
    if B.dim() != 2:
        raise ValueError(
            f"right-hand sides must have shape (n, m), got {tuple(B.shape)}; for one, call the solver itself"
        )
    if X0 is not None and X0.shape != B.shape:
        raise ValueError(f"X0 has shape {tuple(X0.shape)}, the right-hand sides {tuple(B.shape)}")
    solutions = []
    for j in range(B.shape[1]):
        start = {} if X0 is None else {"x0": X0[:, j].contiguous()}
        solutions.append(solver(operator, B[:, j].contiguous(), **start, **options))
    return solutions
