"""Every module of an objective, tried alone: can it be differentiated twice, and carry derivatives forward?

A module is run on the inputs that it is given within a few samples, under the conditions that dhf sets. Where the objective as a
whole cannot be differentiated twice, the innermost modules that cannot either are named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call

from dhf.curvature import GaussNewtonGraph, HessianGraph
from dhf.curvature.gradient import differentiable_once, scalar_loss
from dhf.doctor.conditions import as_in_a_run
from dhf.doctor.finding import ERROR, NOTE, WARNING, Finding, Section, names, of_error
from dhf.errors import UsageError
from dhf.evaluation import check_module, follows_batch
from dhf.objective import Objective
from dhf.parameters import Parameters

__all__ = ["Call", "calls_of", "probe_modules"]

_NAMES = 3
_FUSED_ATTENTION = "fused attention has no second derivative"


@dataclasses.dataclass(slots=True)
class Call:
    """A module's first call within the objective.

    Attributes:
        path: Its name.
        module: Itself.
        args, kwargs: What it was given, detached.
        output: What it returned, detached; None where it did not return.
    """

    path: str
    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any = None

    def differentiate_twice(self) -> None:
        """``∂/∂(c, θ, x) of (Jᵀc)·v``; raises where an operation has no such derivative."""
        (args, kwargs), wanted = _as_leaves((self.args, self.kwargs))
        wanted += [p for p in self.module.parameters() if p.requires_grad]
        outputs = [z for z in _tensors(self.module(*args, **kwargs)) if z.requires_grad]
        if not outputs or not wanted:
            return
        cotangents = [torch.ones_like(z).requires_grad_(True) for z in outputs]
        first = torch.autograd.grad(outputs, wanted, cotangents, create_graph=True, materialize_grads=True)
        _refuse_error_nodes(first)
        kept = [g for g in first if g.requires_grad]
        if kept:
            torch.autograd.grad(kept, [*cotangents, *wanted], [torch.ones_like(g) for g in kept], allow_unused=True)

    def carry_forward(self) -> None:
        """The module on dual numbers; raises where an operation has no forward derivative."""
        with forward_ad.dual_level():
            (args, kwargs), inputs = _as_leaves((self.args, self.kwargs), dual=True)
            duals = {
                name: forward_ad.make_dual(p.detach(), torch.ones_like(p))
                for name, p in self.module.named_parameters()
                if p.requires_grad
            }
            if duals or inputs:
                functional_call(self.module, duals, args, dict(kwargs))


def probe_modules(objective: Objective, batch: Any, curvature: str, seed: int) -> Section:
    """Second and forward derivatives, of every module and of the whole, on one rank's own.

    Args:
        objective: What is looked at.
        batch: A few samples.
        curvature: ``"hessian"``, or one that needs the Gauss-Newton graph.
        seed: Fixes its random numbers.
    """
    section = Section("modules")
    parameters = Parameters(objective.module)
    device = parameters.device
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # told as findings
        try:
            check_module(objective.module)
        except UsageError as error:
            section.findings.append(of_error(error, "the module"))
    _batch_norm(section, objective.module)

    def under_dhf(work: Callable[[], Any]) -> Any:
        with as_in_a_run(objective, seed):
            return work()

    calls: list[Call] = []
    build = HessianGraph if curvature == "hessian" else GaussNewtonGraph
    plain = _failure(lambda: under_dhf(lambda: _value(objective, batch)))
    if plain is not None:  # not a matter of derivatives
        section.findings.append(of_error(plain, "outputs(batch) or loss(outputs, batch)"))
        return section
    whole = _failure(lambda: under_dhf(lambda: _products(build(objective, parameters, batch), parameters)))
    whole = whole or _failure(lambda: under_dhf(lambda: _slope(objective, parameters, batch)))
    _failure(lambda: calls.extend(under_dhf(lambda: calls_of(objective, batch))[0]))
    twice = {call.path: _failure(functools.partial(under_dhf, call.differentiate_twice)) for call in calls}
    ahead = {call.path: _failure(functools.partial(under_dhf, call.carry_forward)) for call in calls}
    kinds = {call.path: type(call.module).__name__ for call in calls}
    section.fact("second derivative", _counted(twice))
    section.fact("forward derivative", _counted(ahead))
    if whole is not None:
        section.findings += _why(objective, whole, twice, kinds)
    for path in _innermost(ahead) if whole is None else []:
        section.find(
            NOTE,
            f"{kinds[path]} has no forward derivative here: {_first_line(ahead[path])}",
            names("module", [path]),
            "nothing, while all graphs fit into memory; those that do not are rebuilt for each product by two backward passes",
        )
    _recurrent(section, objective.module, device)
    return section


def calls_of(objective: Objective, batch: Any) -> tuple[list[Call], Any]:
    """The first call of each module in a forward pass, in the order in which they end (inner ones first), and the outputs."""
    found: dict[str, Call] = {}
    ended: list[Call] = []

    def enter(path: str) -> Callable[..., None]:
        def note(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            if path not in found and not _wrapped((args, kwargs)):
                found[path] = Call(path, module, _detached(args), _detached(kwargs))

        return note

    def leave(path: str) -> Callable[..., None]:
        def note(_: torch.nn.Module, args: Any, output: Any) -> None:
            call = found.get(path)
            if call is not None and call.output is None and not _wrapped(output):
                call.output = _detached(output)
                ended.append(call)

        return note

    with contextlib.ExitStack() as stack:
        for path, module in objective.module.named_modules():
            stack.callback(module.register_forward_pre_hook(enter(path), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave(path)).remove)
        outputs = objective.outputs(batch)
    return ended, outputs


def _value(objective: Objective, batch: Any) -> Tensor:
    outputs = objective.outputs(batch)
    objective.check(outputs, batch)
    return objective.loss(outputs, batch)


def _products(graph: Any, parameters: Parameters) -> None:
    graph.begin(0)
    graph.product([torch.ones_like(p) for p in parameters.tensors])


def _slope(objective: Objective, parameters: Parameters, batch: Any) -> None:
    """The gradient with its graph, to look into."""
    loss = scalar_loss(objective, objective.outputs(batch), batch)
    _refuse_error_nodes(torch.autograd.grad(loss, parameters.tensors, create_graph=True, materialize_grads=True))


def _refuse_error_nodes(derivatives: Sequence[Tensor]) -> None:
    """Raise where a function is marked once_differentiable."""
    if differentiable_once(derivatives):
        raise RuntimeError("a function is marked once_differentiable")


def _why(
    objective: Objective, failure: Exception, twice: Mapping[str, Exception | None], kinds: Mapping[str, str]
) -> list[Finding]:
    """What stands in the way of second derivatives, by the innermost modules that fail, or by the objective itself."""
    if isinstance(failure, UsageError) and "once_differentiable" not in str(failure):  # whose module can be named
        return [of_error(failure, "the objective")]
    found = []
    for path in _innermost(twice):
        error = twice[path]
        assert error is not None
        what, remedy = _account(error)
        found.append(
            Finding(ERROR, f"{kinds[path]} cannot be differentiated twice: {what}", names("module", [path]), remedy)
        )
    if found:
        return found
    what, remedy = _account(failure)
    compiled = [name for name, value in vars(objective).items() if _is_compiled(value)]
    where = f"the objective's {', '.join(compiled)}" if compiled else "the objective's outputs or loss"
    return [Finding(ERROR, f"they cannot be differentiated twice: {what}", where, remedy)]


def _account(error: Exception) -> tuple[str, str]:
    """What an error of autograd means, and what to do."""
    words = " ".join(str(error).split())
    if "aot_autograd" in words or "torch.compile" in words or "dynamo" in words.lower():
        return "torch.compile makes code without a second derivative", "call the plain module or function"
    if "attention" in words:
        return (
            _FUSED_ATTENTION,
            "leave out sdpa_kernel(...) around it, so that dhf can choose the MATH kernel, or name SDPBackend.MATH",
        )
    if "cudnn" in words.lower():
        return (
            "cuDNN has no second derivative of recurrent layers",
            "use torch.nn.RNN, GRU or LSTM, around which dhf turns cuDNN off, or torch.backends.cudnn.flags(enabled=False)",
        )
    if "once_differentiable" in words:
        return (
            "an autograd.Function is marked once_differentiable",
            "write its backward of differentiable operations, and take the mark off",
        )
    missing = re.search(r"derivative for (\S+) is not implemented", words)
    if missing is not None:
        return f"{missing[1]} has no second derivative", "compose it of other operations"
    return _first_line(error), "use operations that autograd can differentiate twice"


def _batch_norm(section: Section, module: torch.nn.Module) -> None:
    norms = [(path, m) for path, m in module.named_modules() if isinstance(m, torch.nn.modules.batchnorm._NormBase)]
    found = [path for path, m in norms if follows_batch(m)]
    if found:
        section.find(
            WARNING,
            "BatchNorm in training mode: the objective is no mean over samples, and depends on how they are split",
            names("module", found),
            "use eval() for it, or GroupNorm or LayerNorm",
        )


def _recurrent(section: Section, module: torch.nn.Module, device: torch.device) -> None:
    found = [path for path, m in module.named_modules() if isinstance(m, torch.nn.RNNBase)]
    if found:
        cost = "its first derivatives are slower here" if device.type == "cuda" else "it would be slower there"
        section.find(
            NOTE,
            f"cuDNN has no second derivative of recurrent layers: on a GPU dhf runs them without it, and {cost}",
            names("module", found),
            "nothing; --products traced joins the time steps of torch's own layers",
        )


def _failure(work: Callable[[], Any]) -> Exception | None:
    try:
        work()
    except Exception as error:
        return error
    return None


def _innermost(failures: Mapping[str, Exception | None]) -> list[str]:
    """The paths that fail, and none beneath them does."""
    failed = [path for path, error in failures.items() if error is not None]
    return [p for p in failed if not any(q != p and q.startswith(f"{p}." if p else "") for q in failed)]


def _counted(failures: Mapping[str, Exception | None]) -> str:
    good = sum(error is None for error in failures.values())
    return f"{good} of {len(failures)} modules"


def _first_line(error: Exception | None) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 160 else f"{text[:157]}..."


def _is_compiled(value: Any) -> bool:
    return type(value).__name__ == "OptimizedModule" or hasattr(value, "_torchdynamo_orig_callable")


def _as_leaves(part: Any, *, dual: bool = False) -> tuple[Any, list[Tensor]]:
    """A nest with its floating-point tensors as leaves that are differentiated, or as dual numbers; and these."""
    leaves: list[Tensor] = []

    def change(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        leaf = forward_ad.make_dual(t.detach(), torch.ones_like(t)) if dual else t.detach().clone().requires_grad_(True)
        leaves.append(leaf)
        return leaf

    return _mapped(change, part), leaves


def _detached(part: Any) -> Any:
    return _mapped(lambda t: t.detach().clone(), part)


def _wrapped(part: Any) -> bool:
    """Whether a tensor is one within a transformation of torch.func, which must not leave it."""
    return any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in _tensors(part))


def _mapped(change: Callable[[Tensor], Tensor], part: Any) -> Any:
    if isinstance(part, Tensor):
        return change(part)
    if isinstance(part, Mapping):
        return {key: _mapped(change, value) for key, value in part.items()}
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*(_mapped(change, value) for value in part))
    if isinstance(part, (tuple, list)):
        return type(part)(_mapped(change, value) for value in part)
    return part


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    parts: Sequence[Any] = (
        list(part.values()) if isinstance(part, Mapping) else part if isinstance(part, (tuple, list)) else ()
    )
    for inner in parts:
        yield from _tensors(inner)
