"""Products by JAX: the same networks written as functions of the same parameters, and a linearization that is kept.

Everything is jitted: the build returns the linearized gradient (or outputs) with its residuals, and each product applies it.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from networks import Case, Laplacian, TanhCell
from product import HESSIAN, Pieces, Product, Unavailable
from torch import nn

__all__ = ["jax_linearize"]

Parameters = Sequence[Any]
# (parameters in the module's order, inputs) -> outputs
Model = Callable[[Parameters, Any], Any]


def jax_linearize(case: Case, matrix: str) -> Product:
    """``jax.linearize``, jitted: of the gradient for the Hessian, of the outputs for Gauss-Newton."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is not its own here
    try:
        jax = import_module("jax")
    except ImportError as error:
        raise Unavailable(f"{error.name or 'jax'} cannot be imported here: {error}") from error
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")  # as torch; a GPU would take TF32 otherwise
    pieces = Pieces(case.module)
    parameters = [jax.numpy.asarray(p.detach().cpu().numpy()) for p in pieces.tensors]
    x, y = (jax.numpy.asarray(t.cpu().numpy()) for t in (case.inputs, case.targets))
    model, loss = _model(case.module), _loss(case.loss)

    def build(parameters: Parameters, x: Any, y: Any) -> Any:
        if matrix == HESSIAN:
            return jax.linearize(jax.grad(lambda p: loss(model(p, x), y)), parameters)[1]
        z, push = jax.linearize(lambda p: model(p, x), parameters)
        _, curve = jax.linearize(jax.grad(lambda z: loss(z, y)), z)
        return push, curve

    def apply(kept: Any, v: Any) -> Any:
        if matrix == HESSIAN:
            return kept(v)
        push, curve = kept
        return jax.linear_transpose(push, v)(curve(push(v)))[0]

    kept = jax.block_until_ready(_jitted(jax, build, case, matrix, "build")(parameters, x, y))
    product = _jitted(jax, apply, case, matrix, "apply")

    def memory() -> tuple[int, int]:
        held = sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(kept) if leaf is not x and leaf is not y)
        plan = product.lower(kept, parameters).compile().memory_analysis()
        return held, held + plan.temp_size_in_bytes + plan.output_size_in_bytes

    return Product(
        lambda v: jax.block_until_ready(product(kept, v)),
        lambda v: [jax.numpy.asarray(piece.cpu().numpy()) for piece in pieces.split(v)],
        lambda result: pieces.join([torch.from_numpy(np.array(piece)).to(case.inputs.device) for piece in result]),
        memory=memory,
    )


_JITTED: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, str], Any]] = weakref.WeakKeyDictionary()


def _jitted(jax: Any, function: Callable[..., Any], case: Case, matrix: str, part: str) -> Any:
    """The jitted function, compiled once per module, so that a second build costs what it does in the next step."""
    return _JITTED.setdefault(case.module, {}).setdefault((matrix, part), jax.jit(function))


def _loss(loss: nn.Module) -> Callable[[Any, Any], Any]:
    jax = import_module("jax")
    np_, log_softmax = jax.numpy, jax.nn.log_softmax
    if isinstance(loss, nn.MSELoss):
        return lambda z, y: np_.mean((z - y) ** 2)
    if isinstance(loss, nn.BCEWithLogitsLoss):
        return lambda z, y: np_.mean(jax.nn.softplus(z) - y * z)
    if isinstance(loss, nn.CrossEntropyLoss):
        return lambda z, y: -np_.mean(np_.take_along_axis(log_softmax(z), y[:, None], 1))
    raise Unavailable(f"{type(loss).__name__} is not written for JAX here")


def _model(module: nn.Module) -> Model:
    """The function of a benchmark's network."""
    if isinstance(module, Laplacian):
        return _laplacian(_sequential(module.network))
    if isinstance(module, nn.Sequential):
        return _sequential(module)
    layer = getattr(module, "layer", None)
    if isinstance(layer, TanhCell):
        return _handwritten
    if isinstance(layer, nn.GRU):
        return _gru
    if isinstance(layer, nn.RNN):
        return _rnn
    if hasattr(module, "encoder"):
        return _encoder(module)
    raise Unavailable("this network is not written for JAX here")


def _sequential(module: nn.Sequential) -> Model:
    jax = import_module("jax")
    pointwise = {nn.Sigmoid: jax.nn.sigmoid, nn.Tanh: jax.numpy.tanh}

    def model(parameters: Parameters, x: Any) -> Any:
        given = iter(parameters)
        for layer in module:
            if isinstance(layer, nn.Linear):
                x = x @ next(given).T + next(given)
            elif isinstance(layer, nn.Conv2d):
                padding = [(p, p) for p in layer.padding]
                x = jax.lax.conv_general_dilated(x, next(given), layer.stride, padding) + next(given)[:, None, None]
            elif isinstance(layer, nn.Flatten):
                x = x.reshape(x.shape[0], -1)
            else:
                x = pointwise[type(layer)](x)
        return x

    return model


def _laplacian(network: Model) -> Model:
    """Second derivatives by jvp of jvp, the shortest way in JAX."""
    jax = import_module("jax")

    def model(parameters: Parameters, x: Any) -> Any:
        def second(direction: Any) -> Any:
            def slope(at: Any) -> Any:
                return jax.jvp(lambda a: network(parameters, a), (at,), (direction,))[1]

            return jax.jvp(slope, (x,), (direction,))[1]

        unit = jax.numpy.eye(x.shape[1], dtype=x.dtype)
        return sum(second(jax.numpy.broadcast_to(e, x.shape)) for e in unit)

    return model


def _rnn(parameters: Parameters, x: Any) -> Any:
    jax = import_module("jax")
    w_in, w_across, b_in, b_across, w_head, b_head = parameters

    def step(h: Any, inward: Any) -> tuple[Any, None]:
        return jax.numpy.tanh(inward + h @ w_across.T), None

    inward = (x @ w_in.T + b_in + b_across).swapaxes(0, 1)
    h, _ = jax.lax.scan(step, jax.numpy.zeros((x.shape[0], w_across.shape[1]), x.dtype), inward)
    return h @ w_head.T + b_head


def _handwritten(parameters: Parameters, x: Any) -> Any:
    w_in, b_in, w_across, w_head, b_head = parameters
    return _rnn((w_in, w_across, b_in, 0 * b_in, w_head, b_head), x)


def _gru(parameters: Parameters, x: Any) -> Any:
    jax = import_module("jax")
    w_in, w_across, b_in, b_across, w_head, b_head = parameters

    def step(h: Any, inward: Any) -> tuple[Any, None]:
        r_in, z_in, n_in = jax.numpy.split(inward, 3, 1)
        r_h, z_h, n_h = jax.numpy.split(h @ w_across.T + b_across, 3, 1)
        r, z = jax.nn.sigmoid(r_in + r_h), jax.nn.sigmoid(z_in + z_h)
        return (1 - z) * jax.numpy.tanh(n_in + r * n_h) + z * h, None

    inward = (x @ w_in.T + b_in).swapaxes(0, 1)
    h, _ = jax.lax.scan(step, jax.numpy.zeros((x.shape[0], w_across.shape[1]), x.dtype), inward)
    return h @ w_head.T + b_head


def _encoder(module: nn.Module) -> Model:
    """nn.TransformerEncoder with normalisation after each block, and a linear layer on its last token."""
    jax = import_module("jax")
    layers: Any = module.encoder.layers
    heads, epsilon = layers[0].self_attn.num_heads, layers[0].norm1.eps

    def normalise(x: Any, weight: Any, bias: Any) -> Any:
        return jax.nn.standardize(x, axis=-1, epsilon=epsilon) * weight + bias

    def attend(x: Any, w: Any, b: Any, w_out: Any, b_out: Any) -> Any:
        q, k, v = (t.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2) for t in jax.numpy.split(x @ w.T + b, 3, axis=-1))
        weights = jax.nn.softmax(q @ k.swapaxes(2, 3) / math.sqrt(q.shape[-1]))
        return (weights @ v).swapaxes(1, 2).reshape(x.shape) @ w_out.T + b_out

    def model(parameters: Parameters, x: Any) -> Any:
        given = iter(parameters)
        for _ in layers:
            attention = [next(given) for _ in range(4)]
            w1, b1, w2, b2, *norms = [next(given) for _ in range(8)]
            x = normalise(x + attend(x, *attention), *norms[:2])
            x = normalise(x + jax.nn.gelu(x @ w1.T + b1, approximate=False) @ w2.T + b2, *norms[2:])
        return x[:, -1] @ next(given).T + next(given)

    return model
