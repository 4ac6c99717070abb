"""Products by torch alone and by dhf: graphs rebuilt each time, graphs kept, compiled, and torch.func."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from networks import Case, Laplacian
from product import GAUSS_NEWTON, HESSIAN, Pieces, Product, Unavailable, model_of
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import jvp, vjp

import dhf

__all__ = [
    "compiled",
    "functional",
    "kept_vjp",
    "launched",
    "naive",
    "retained",
    "traced",
    "with_functional_derivatives",
]


def naive(case: Case, matrix: str) -> Product:
    """Double backward as one writes it first: every product builds its graph and throws it away."""
    pieces = Pieces(case.module)
    tensors = pieces.tensors

    def hessian(v: list[Tensor]) -> Any:
        loss = case.loss(case.module(case.inputs), case.targets)
        gradient = grad(loss, tensors, create_graph=True, materialize_grads=True)
        kept, cotangents = zip(*[(g, w) for g, w in zip(gradient, v, strict=True) if g.requires_grad], strict=True)
        return grad(kept, tensors, cotangents, materialize_grads=True)

    def gauss_newton(v: list[Tensor]) -> Any:
        z = case.module(case.inputs)
        u = torch.zeros_like(z, requires_grad=True)
        pulled = grad(z, tensors, u, create_graph=True, materialize_grads=True)
        kept, cotangents = zip(*[(p, w) for p, w in zip(pulled, v, strict=True) if p.requires_grad], strict=True)
        (Jv,) = grad(kept, u, cotangents)
        at = z.detach().requires_grad_(True)
        (slope,) = grad(case.loss(at, case.targets), at, create_graph=True)
        (HJv,) = grad(slope, at, Jv)
        return grad(z, tensors, HJv, materialize_grads=True)

    return Product(hessian if matrix == HESSIAN else gauss_newton, pieces.split, pieces.join)


def retained(case: Case, matrix: str) -> Product:
    """dhf on graphs that are kept, as its solvers call it."""
    return _dhf(case, matrix)


def traced(case: Case, matrix: str) -> Product:
    """dhf with ``products="traced"``: recorded operations, replayed."""
    return _dhf(case, matrix, products="traced")


def compiled(case: Case, matrix: str) -> Product:
    """dhf with ``products="compiled"``: recorded operations, compiled."""
    return _dhf(case, matrix, products="compiled")


def launched(case: Case, matrix: str) -> Product:
    """dhf on graphs that are kept, on a GPU without recording their products."""
    if case.inputs.device.type != "cuda":
        raise Unavailable("products are recorded on a GPU alone")
    product = _dhf(case, matrix)
    operator = product.multiply.__self__  # type: ignore[attr-defined]
    operator.apply(operator.gradient)
    operator._replays.replay.refused = "the benchmark wants it so"
    return product


def _dhf(case: Case, matrix: str, **options: Any) -> Product:
    make = dhf.Hessian if matrix == HESSIAN else dhf.GaussNewton
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        operator = make(_objective(case.module, case.loss), [(case.inputs, case.targets)], **options)
    operator.__enter__()
    for warning in said:
        if "products are retained" in str(warning.message):
            operator.__exit__(None, None, None)
            raise Unavailable(str(warning.message))
    return Product(
        operator.apply, flatten=lambda answer: answer[0].clone(), close=lambda: operator.__exit__(None, None, None)
    )


@functools.lru_cache(
    maxsize=8
)  # recordings belong to an objective: a second build uses the first one's, as the next step does
def _objective(module: nn.Module, loss: nn.Module) -> dhf.Objective:
    return dhf.Objective(module, loss)


def functional(case: Case, matrix: str) -> Product:
    """torch.func as its manual has it: the Hessian by jvp of grad; Gauss-Newton by jvp, and a vjp that is kept."""
    case, pieces, at = _functional_case(case)
    model, loss_at = model_of(case), _composed(case.loss)

    def outputs(parameters: tuple[Tensor, ...]) -> Tensor:
        return model(dict(zip(at, parameters, strict=True)), case.inputs)

    def loss(parameters: tuple[Tensor, ...]) -> Tensor:
        return loss_at(outputs(parameters), case.targets)

    values = tuple(at.values())
    slope = torch.func.grad(lambda z: loss_at(z, case.targets))
    if matrix == HESSIAN:
        gradient = torch.func.grad(loss)
        return Product(lambda v: jvp(gradient, (values,), (v,))[1], lambda v: tuple(pieces.split(v)), pieces.join)
    _, pull = vjp(outputs, values)

    def gauss_newton(v: tuple[Tensor, ...]) -> Any:
        z, Jv = jvp(outputs, (values,), (v,))
        return pull(jvp(slope, (z,), (Jv,))[1])[0]

    return Product(gauss_newton, lambda v: tuple(pieces.split(v)), pieces.join)


def kept_vjp(case: Case, matrix: str) -> Product:
    """torch.func's other way to a Hessian, by its symmetry: a vjp of grad, made once and called for every vector."""
    if matrix == GAUSS_NEWTON:
        raise Unavailable("a kept vjp gives Jᵀu, and no J v")
    case, pieces, at = _functional_case(case)
    model = model_of(case)

    def loss(parameters: tuple[Tensor, ...]) -> Tensor:
        return case.loss(model(dict(zip(at, parameters, strict=True)), case.inputs), case.targets)

    _, product = vjp(torch.func.grad(loss), tuple(at.values()))
    return Product(lambda v: product(v)[0], lambda v: tuple(pieces.split(v)), pieces.join)


def with_functional_derivatives(case: Case) -> Case:
    """The case for torch.func's transforms, which cannot enter torch.autograd.grad: inner derivatives by grad of grad."""
    return case._replace(module=_FunctionalLaplacian(case.module)) if isinstance(case.module, Laplacian) else case


def _composed(loss: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss; of mean squares written out, since torch's cannot be entered by jvp of grad ("ZeroTensors are immutable")."""
    return (lambda z, y: (z - y).square().mean()) if isinstance(loss, nn.MSELoss) else loss


def _functional_case(case: Case) -> tuple[Case, Pieces, dict[str, Tensor]]:
    case = with_functional_derivatives(case)
    return case, Pieces(case.module), {name: p.detach() for name, p in case.module.named_parameters()}


class _FunctionalLaplacian(nn.Module):
    def __init__(self, original: Laplacian) -> None:
        super().__init__()
        self.network = copy.deepcopy(original.network)

    def forward(self, x: Tensor) -> Tensor:
        slope = torch.func.grad(lambda at: self.network(at).sum())
        second = [torch.func.grad(lambda at, i=i: slope(at)[:, i].sum())(x)[:, i] for i in range(x.shape[1])]
        return torch.stack(second).sum(0).unsqueeze(1)
