"""identity: r, whatever the operator and damping."""

from __future__ import annotations

import torch

from dhf.preconditioners import identity


def test_gives_back_what_it_gets() -> None:
    r = torch.randn(5)
    for damping in (0.0, 3.0):
        assert torch.equal(identity(None, damping)(r), r)
