"""Products by other packages for PyTorch, each as its documentation has it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from networks import Case
from product import GAUSS_NEWTON, HESSIAN, Pieces, Product, Unavailable, model_of, without_idle
from product_torch import with_functional_derivatives
from torch import Tensor, nn

__all__ = ["backpack", "curvlinops", "pyhessian", "torchmin"]


def curvlinops(case: Case, matrix: str) -> Product:
    """Its linear operators, on flat vectors and without the check of determinism."""
    package = _installed("curvlinops")
    case = with_functional_derivatives(case)
    make = package.HessianLinearOperator if matrix == HESSIAN else package.GGNLinearOperator
    data = [(case.inputs, case.targets)]
    operator = make(case.module, case.loss, list(case.module.parameters()), data, check_deterministic=False)
    return Product(operator.__matmul__)


def backpack(case: Case, matrix: str) -> Product:
    """``backpack.hessianfree``: the gradient graph, or that of loss and outputs, is kept; it rebuilds the rest each time."""
    _installed("backpack")
    hvp, ggnvp = import_module("backpack.hessianfree.hvp"), import_module("backpack.hessianfree.ggnvp")
    pieces = Pieces(without_idle(case).module)
    tensors = pieces.tensors
    outputs = case.module(case.inputs)
    loss = case.loss(outputs, case.targets)
    if matrix == HESSIAN:
        gradient = torch.autograd.grad(loss, tensors, create_graph=True)
        return Product(
            lambda v: hvp.hessian_vector_product(loss, tensors, v, grad_params=gradient), pieces.split, pieces.join
        )
    return Product(lambda v: ggnvp.ggn_vector_product_from_plist(loss, outputs, tensors, v), pieces.split, pieces.join)


def pyhessian(case: Case, matrix: str) -> Product:
    """The product that PyHessian's own algorithms call on one batch, whose gradient graph it keeps."""
    if matrix == GAUSS_NEWTON:
        raise Unavailable("PyHessian has no Gauss-Newton products")
    package, parts = _installed("pyhessian"), import_module("pyhessian.utils")
    training = case.module.training
    pieces = Pieces(without_idle(case).module)
    kept = package.hessian(case.module, case.loss, data=(case.inputs, case.targets), cuda=case.inputs.is_cuda)
    case.module.train(training)

    def close() -> None:
        kept.gradsH.clear()
        for p in pieces.tensors:  # a gradient with a graph refers to its parameter, and the parameter to it
            p.grad = None

    multiply = lambda v: parts.hessian_vector_product(kept.gradsH, kept.params, v)  # noqa: E731
    return Product(multiply, pieces.split, pieces.join, close)


def torchmin(case: Case, matrix: str) -> Product:
    """pytorch-minimize: what its Newton and least-squares methods multiply with, both on kept graphs."""
    _installed("torchmin")
    functions = import_module("torchmin.function")
    sizes = {name: p.shape for name, p in case.module.named_parameters()}
    flat = torch.cat([p.detach().reshape(-1) for p in case.module.parameters()])
    model = model_of(case)

    def outputs(theta: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in sizes.values()])
        named = {name: part.view(shape) for (name, shape), part in zip(sizes.items(), parts, strict=True)}
        return model(named, case.inputs)

    if matrix == HESSIAN:
        function = functions.ScalarFunction(lambda t: case.loss(outputs(t), case.targets), flat.shape, hessp=True)
        return Product(function.closure(flat).hessp.mv)
    if not isinstance(case.loss, nn.MSELoss):
        raise Unavailable("pytorch-minimize has Gauss-Newton products for least squares alone")
    residuals = functions.VectorFunction(lambda t: outputs(t) - case.targets, flat.shape, jacp=True)
    J = residuals.closure(flat).jacp
    scale = 2 / case.targets.numel()
    return Product(lambda v: J.rmv(J.mv(v)).mul_(scale))


def _installed(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise Unavailable(f"{error.name or name} cannot be imported here: {error}") from error
