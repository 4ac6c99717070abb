"""The example dhf starts from: differentiate a gradient once more, again and again, from one retained graph.

y = (w + x)(w + 1) at w = 1, x = 2:  ∂y/∂w = 2w + x + 1 = 5,  ∂y/∂x = w + 1 = 2.
z = ∂y/∂w + ∂y/∂x = 3w + x + 2:      ∂z/∂w = 3,  ∂z/∂x = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dhf


class Seed(nn.Module):
    """The function of two scalars."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
        self.x = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, _: Tensor) -> Tensor:
        return ((self.w + self.x) * (self.w + 1)).reshape(1)


def test_the_retained_graph_of_autograd() -> None:
    module = Seed()
    gradient = torch.autograd.grad(module(torch.zeros(1)).sum(), (module.w, module.x), create_graph=True)
    assert [g.item() for g in gradient] == [5, 2]
    z = gradient[0] + gradient[1]
    for _ in range(3):
        slope = torch.autograd.grad(z, (module.w, module.x), retain_graph=True)
        assert [s.item() for s in slope] == [3, 1]


def test_the_same_through_dhf() -> None:
    objective = dhf.Objective(Seed(), lambda outputs, batch: outputs.mean())
    with dhf.Hessian(objective, [(torch.zeros(1), None)]) as A:
        assert A.loss == 6
        assert A.gradient.tolist() == [5, 2]
        ones = torch.ones(2, dtype=torch.float64)
        for _ in range(3):
            assert (A @ ones).tolist() == [3, 1]
        assert (A @ torch.tensor([1.0, 0.0], dtype=torch.float64)).tolist() == [2, 1]
        assert (A @ torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() == [1, 0]
