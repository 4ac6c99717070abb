"""Products of random vectors, in numbers that depend on counts alone, so that all parties take the same without agreeing."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from dhf.errors import NonFiniteError
from dhf.reason import Reason
from dhf.solvers.linear_operator import AgreeingOperator, as_operator, empty_vector

__all__ = ["Products"]


class Products:
    """A symmetric operator whose products are counted and looked at.

    Args:
        operator: A GlobalOperator, a square tensor, or any object with ``matvec`` and ``shape``.

    Attributes:
        n: The length of its vectors.
        whole: A vector of shape (n,) without values, of its dtype and device.
        space: Its inner products.
        count: Products taken.
    """

    def __init__(self, operator: Any) -> None:
        self.whole = empty_vector(operator)
        self._operator: AgreeingOperator = as_operator(operator)
        self.n, self.space, self.count = len(self.whole), self._operator.space, 0

    def piece(self, whole: Tensor) -> Tensor:
        """What this rank stores of a vector."""
        return self.space.piece(whole)

    def __call__(self, v: Tensor) -> Tensor:
        """``A v``, valid until the next.

        Raises:
            NonFiniteError: If it is not finite; on all ranks.
            RankError: If code failed on a rank.
        """
        product, agreed = self._operator.apply(v)
        self.count += 1
        if agreed.reason is Reason.NON_FINITE:
            raise NonFiniteError(
                "a product holds NaN or infinity; look at the data of the ranks and the scale of the loss"
            )
        return product.detach()

    def inner(self, x: Tensor, y: Tensor) -> float:
        """``x·y``, finite.

        Raises:
            NonFiniteError: If it is not.
        """
        (value,) = self.space.dots((x, y))
        if not math.isfinite(value):
            raise NonFiniteError("a product holds NaN or infinity; look at the operator's data")
        return value
