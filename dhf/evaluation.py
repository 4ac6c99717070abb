"""Evaluation: the conditions under which an objective is one deterministic, twice differentiable function.

Within one step the same function is built into graphs and evaluated at trial points. So its random numbers are
fixed per micro-batch, its buffers do not move, and its kernels are those that can be differentiated twice.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dhf.errors import UsageError
from dhf.objective import Objective

__all__ = [
    "check_module",
    "dropping",
    "evaluate",
    "follows_batch",
    "full_precision",
    "micro_batch_seeds",
    "moving_buffers",
    "naming_micro_batch",
    "reproducible",
    "restore_buffers",
    "stream_seed",
    "twice_differentiable",
]

# modules whose objective holds derivatives itself: a PDE's residuals, say
_differentiated: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def stream_seed(*key: int) -> int:
    """One 63-bit seed for a random stream named by integers (seed, step, rank, micro-batch, ...)."""
    return int(np.random.SeedSequence([k & 0xFFFFFFFF for k in key]).generate_state(1, np.uint64)[0] >> 1)


def micro_batch_seeds(seed: int, rank: int, number: int) -> list[int]:
    """One seed for each of a rank's micro-batches, the same in graphs and at trial points."""
    return [stream_seed(seed, seed >> 32, rank, j) for j in range(number)]


@contextlib.contextmanager
def naming_micro_batch(index: int) -> Iterator[None]:
    """Note on an exception which micro-batch it came from, as its attribute ``micro_batch``."""
    try:
        yield
    except Exception as error:
        with contextlib.suppress(AttributeError):  # an exception type may have slots
            error.micro_batch = index  # type: ignore[attr-defined]
        raise


@contextlib.contextmanager
def reproducible(
    objective: Objective, device: torch.device, seed: int, *, move_buffers: bool = False
) -> Iterator[None]:
    """Fix torch's random numbers to ``seed`` inside; restore their state and the module's running statistics after.

    With ``move_buffers`` the running statistics of BatchNorm stay where the forward pass left them, unless it fails.
    """
    buffers = moving_buffers(objective.module)
    kept = [b.clone() for b in buffers]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # torch.manual_seed would also seed GPUs that are not ours to restore
        torch.random.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        done = False
        try:
            yield
            done = True
        finally:
            if not (move_buffers and done):
                restore_buffers(buffers, kept)


@contextlib.contextmanager
def twice_differentiable(module: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Use kernels with a second derivative: composed attention, no fused encoder layers, no cuDNN RNN, no oneDNN LSTM."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    recurrent = device.type == "cuda" and any(isinstance(m, torch.nn.RNNBase) for m in module.modules())
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(full_precision(device))
            if recurrent:
                stack.enter_context(torch.backends.cudnn.flags(enabled=False, allow_tf32=False))
            if device.type == "cpu" and _lstm_alone(module):
                stack.enter_context(_without_onednn())
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _lstm_alone(module: torch.nn.Module) -> bool:
    """Whether there are LSTMs, and no convolutions, which would lose more than LSTMs gain."""
    kinds = [type(m) for m in module.modules()]
    return any(issubclass(kind, torch.nn.LSTM) for kind in kinds) and not any(
        issubclass(kind, torch.nn.modules.conv._ConvNd) for kind in kinds
    )


@contextlib.contextmanager
def _without_onednn() -> Iterator[None]:
    """Its LSTM in float32 is one operation, with neither a recording nor a forward derivative."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags sets TF32, too, and warns of it
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Keep float32 at float32 on a GPU: no TF32 in matrix products and convolutions."""
    if device.type != "cuda":
        yield
        return
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul
        torch.backends.cudnn.allow_tf32 = convolution


def check_module(module: torch.nn.Module) -> None:
    """Refuse modules that cannot be differentiated twice, by name; warn of those that change what is minimised."""
    warned = False
    for path, child in module.named_modules():
        if isinstance(child, torch.nn.EmbeddingBag):
            raise UsageError(
                f"submodule {path!r} is an EmbeddingBag, which has no second derivative; use Embedding and a sum or mean"
            )
        if isinstance(child, torch.nn.SyncBatchNorm):
            raise UsageError(
                f"submodule {path!r} is a SyncBatchNorm, which has no second derivative; use GroupNorm or LayerNorm"
            )
        if isinstance(child, torch.nn.modules.batchnorm._NormBase) and follows_batch(child) and not warned:
            warned = True
            warnings.warn(
                f"submodule {path!r} is a {type(child).__name__} in training mode: the objective is then not a mean over "
                "samples, and its value depends on how samples are split into micro-batches and over ranks; "
                "use eval() for it, or GroupNorm or LayerNorm",
                stacklevel=3,
            )


def dropping(module: torch.nn.Module) -> list[str]:
    """The names of the submodules whose dropout is on."""
    found = []
    for path, m in module.named_modules():
        rate = m.p if isinstance(m, torch.nn.modules.dropout._DropoutNd) else 0.0
        if isinstance(m, torch.nn.RNNBase) and m.num_layers > 1:
            rate = m.dropout
        if isinstance(m, torch.nn.MultiheadAttention):
            rate = m.dropout
        if m.training and rate > 0:
            found.append(path)
    return found


def moving_buffers(module: torch.nn.Module) -> list[Tensor]:
    """The running statistics that a forward pass in training mode moves."""
    norms = (m for m in module.modules() if isinstance(m, torch.nn.modules.batchnorm._NormBase))
    return [b for m in norms if follows_batch(m) and m.track_running_stats for b in m.buffers(recurse=False)]


def restore_buffers(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Put values back into buffers that a forward pass has moved."""
    for buffer, value in zip(buffers, values, strict=True):
        # .data: the graph has saved this buffer, and a bumped version would make it refuse its backward
        buffer.data.copy_(value)


@torch.no_grad()
def evaluate(
    objective: Objective, device: torch.device, batches: Sequence[Any], seeds: Sequence[int]
) -> tuple[float, float]:
    """This rank's ``Σ count·loss`` and ``Σ count`` over its micro-batches, in float64; no weight decay, no graph."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    weight = 0.0
    for j, (batch, seed) in enumerate(zip(batches, seeds, strict=True)):
        with naming_micro_batch(j):
            count = objective.count(batch)
            if count == 0:
                continue
            total += _loss(objective, device, batch, seed).double() * count
            weight += count
    return total.item(), weight


def _loss(objective: Objective, device: torch.device, batch: Any, seed: int) -> Tensor:
    """The mean loss over a micro-batch, without a graph; with one in between where the objective takes derivatives itself."""
    if objective.module not in _differentiated:
        try:
            with reproducible(objective, device, seed), twice_differentiable(objective.module, device):
                return objective.loss(objective.outputs(batch), batch)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            _differentiated.add(objective.module)
    with torch.enable_grad(), reproducible(objective, device, seed), twice_differentiable(objective.module, device):
        return objective.loss(objective.outputs(batch), batch).detach()


def follows_batch(norm: torch.nn.Module) -> bool:
    """Whether a normalisation depends on the other samples of its batch, or its running statistics move with them."""
    # InstanceNorm normalises within a sample; only its running statistics follow the batch
    within_sample = isinstance(norm, torch.nn.modules.instancenorm._InstanceNorm)
    return norm.training and (bool(norm.track_running_stats) or not within_sample)
