"""forcing_term against values by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dhf.solvers import forcing_term


@pytest.mark.parametrize(
    ("norm", "last_norm", "last_term", "options", "term"),
    [
        (7.0, None, None, {}, 0.5),  # the first step
        (7.0, None, None, {"largest": 0.3}, 0.3),
        (7.0, 0.0, 0.1, {}, 0.5),  # nothing to compare with
        (1.0, 2.0, 0.5, {}, 0.225),  # 0.9 / 4; the safeguard is 0.9 / 4 too
        (1.0, 10.0, 0.5, {}, 0.225),  # 0.9 / 100, raised by the safeguard 0.9 · 0.5² > 0.1
        (1.0, 10.0, 0.3, {}, 0.009),  # 0.9 · 0.3² = 0.081 is no safeguard
        (1.0, 10.0, None, {}, 0.009),
        (3.0, 2.0, 0.1, {}, 0.5),  # the gradient grew
        (1e200, 1e-200, 0.1, {}, 0.5),
        (1.0, 1e9, 0.1, {}, 1e-6),
        (0.0, 1.0, 0.1, {}, 1e-6),
        (1.0, 1e9, 0.1, {"smallest": 1e-3}, 1e-3),
        (1.0, 4.0, 0.1, {"gamma": 1.0, "alpha": (1 + math.sqrt(5)) / 2}, 0.106132),  # 4^-1.618034
        (1.0, 4.0, 0.1, {"gamma": 0.5, "alpha": 1.5}, 0.0625),
    ],
)
def test_terms(norm: float, last_norm: float, last_term: float, options: dict[str, Any], term: float) -> None:
    assert forcing_term(norm, last_norm, last_term, **options) == pytest.approx(term, rel=1e-4)


def test_terms_of_a_gradient_that_falls_quadratically() -> None:
    norms, terms = [1e-1, 1e-2, 1e-4, 1e-8], []
    for k, norm in enumerate(norms):
        terms.append(forcing_term(norm, norms[k - 1] if k else None, terms[-1] if terms else None))
    assert terms == pytest.approx([0.5, 0.225, 9e-5, 1e-6])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"gradient_norm": math.nan}, "gradient_norm must be finite"),
        ({"gradient_norm": -1.0}, "gradient_norm must be finite and not negative"),
        ({"gradient_norm": 1.0, "last_norm": math.inf}, "last_norm must be finite"),
        ({"gradient_norm": 1.0, "gamma": 1.5}, "gamma=1.5"),
        ({"gradient_norm": 1.0, "alpha": 1.0}, "alpha=1.0"),
        ({"gradient_norm": 1.0, "largest": 1.0}, "largest=1.0"),
        ({"gradient_norm": 1.0, "smallest": 0.0}, "smallest=0.0"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        forcing_term(**arguments)
