"""How what every rank has computed of a product becomes one product, and one verdict: what there is in common.

Whole (whole.py) has every rank receive all of it, Pieces (pieces.py) one piece of it. Riders are sums that the operator itself
needs with a product. In both, a rank that fails still takes part, and all ranks learn of it together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from dhf.coordinator import Verdict
from dhf.reason import Reason
from dhf.vector_space import VectorSpace

__all__ = ["Part", "Reduced", "Reducer", "Reduction", "Status", "Target", "Work"]


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """Where a rank writes its share.

    Attributes:
        out: Of the product, shape (n,).
        riders: Of what rides with it, shape (riders,); zero at first.
        ready: To be called with the index of each parameter whose part of ``out`` is final, in any order; None where nobody
            wants to know.
    """

    out: Tensor
    riders: Tensor
    ready: Callable[[int], None] | None = None


Work = Callable[[Tensor | None, Target], Any]
Part = Callable[[Sequence[Tensor], Sequence[Tensor]], Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """What a rank says with a product.

    Attributes:
        proposal: Why its solver wants to end, or None to go on.
        failure: What went wrong since the last product.
        moved: Says on a GPU whether its parameters have moved, as a 0-dim tensor; None where that is known otherwise.
        search: Looks for what is not finite.
    """

    proposal: Reason | None = None
    failure: BaseException | None = None
    moved: Callable[[], Tensor | None] = lambda: None
    search: Callable[[], Any] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Reduced:
    """A product as this rank holds it, valid until the next; the riders' sums, and what was agreed."""

    product: Tensor
    riders: Tensor
    verdict: Verdict


class Reducer(Protocol):
    """One way of adding up products."""

    def reduce(self, work: Work, v: Tensor | None, status: Status, add: Sequence[tuple[Tensor, float]] = ()) -> Reduced:
        """The sum over ranks of what each one's ``work(v, target)`` writes, plus multiples of vectors.

        Args:
            work: Called with the whole vector v, shape (n,); its failure is told to all ranks.
            v: As this rank holds it; None where the work needs none, on all ranks alike, or where this rank does none.
            status: Of this rank.
            add: Vectors as this rank holds them, with their factors; added after the sum.
        """


class Reduction(Reducer, Protocol):
    """One way of storing vectors."""

    space: VectorSpace

    def spread(self, parts: Sequence[Part], owners: Sequence[int], r: Tensor) -> Tensor:
        """A function of whole vectors in parts, each of which writes to its own place in an ``out`` of zeros.

        Args:
            parts: ``part(r, out)``, both as one tensor per parameter.
            owners: The rank of each part, for vectors in pieces; that rank alone calls it.
            r: As this rank holds it.

        Returns:
            What the parts have written, as this rank holds it; a new tensor.
        """
