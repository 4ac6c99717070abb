"""Functions without second derivatives are refused, also where autograd would pass over them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dhf


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (1 - ctx.saved_tensors[0].tanh() ** 2)


class _Layer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Tanh.apply(x)


@pytest.mark.parametrize("operator", [dhf.Hessian, dhf.GaussNewton, dhf.Fisher])
@pytest.mark.parametrize("products", ["retained", "traced"])
def test_once_differentiable_is_refused(operator: type, products: str) -> None:
    module = nn.Sequential(nn.Linear(2, 3), _Layer(), nn.Linear(3, 2)).double()
    batch = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    objective = dhf.Objective(module, nn.MSELoss())
    for _ in range(2):  # it is not forgotten that it was refused
        with pytest.raises(dhf.UsageError, match="marked once_differentiable"):
            operator(objective, [batch], products=products)
