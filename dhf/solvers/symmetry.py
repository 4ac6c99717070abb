"""SymmetryCheck: whether an operator is symmetric, seen from the first products of a solve, at no product of its own.

    uᵀ(A v) = vᵀ(A u)    for every u and v that have been multiplied, if A is symmetric

Unlike the orthogonality of residuals, which rounding destroys, this holds for computed vectors too, up to the rounding of the
two products: a few ε‖A‖‖u‖‖v‖, a hundred times less than what is called a violation here. ‖A‖ is taken from the products
themselves. A preconditioner that is all but A⁻¹ keeps the large eigenvalues out of them, and in single precision that may hide
a ‖A‖ whose rounding is as large as all that is seen; so there the check is left out.
"""

from __future__ import annotations

import torch

__all__ = ["SymmetryCheck"]

_VIOLATION = 1e-3
_PRODUCTS = 5


class SymmetryCheck:
    """What the first products of a solve tell.

    Args:
        dtype: Of the vectors.
        preconditioned: Whether the solve is.
    """

    def __init__(self, dtype: torch.dtype, preconditioned: bool) -> None:
        self._left = 0 if preconditioned and dtype == torch.float32 else _PRODUCTS
        self._norm, self._vAu, self._u_norm = 0.0, 0.0, 0.0

    @property
    def wanted(self) -> bool:
        """Whether the next product is still to be checked."""
        return self._left > 0

    def expect(self, vAu: float, u_norm: float) -> None:
        """Remember ``vᵀ(A u)``; v is what is multiplied next."""
        self._vAu, self._u_norm = vAu, u_norm

    def violated(self, uAv: float, v_norm: float, Av_norm: float) -> bool:
        """Whether ``uᵀ(A v)`` grossly differs from what was remembered; give 0 for the first product, which has no u."""
        self._left -= 1
        if v_norm > 0:
            self._norm = max(self._norm, Av_norm / v_norm)
        return abs(uAv - self._vAu) > _VIOLATION * self._norm * (self._u_norm + v_norm) * v_norm
