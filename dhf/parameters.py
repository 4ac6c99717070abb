"""The flat vector <-> a module's named trainable tensors: frozen, tied, unused and empty ones handled here, once."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

import torch
from torch import Tensor

from dhf.errors import StaleGraphError, UsageError

__all__ = ["Parameters", "Snapshot"]


class Parameters:
    """The trainable parameters of a module, seen as one flat vector.

    Frozen parameters (``requires_grad=False``) are left out; tied parameters appear once, under the first
    name; parameters with no elements are kept and take no room. The order is ``module.named_parameters()``.

    Args:
        module: The module that owns the parameters.
        only: Patterns of the names that are wanted, ``*`` and ``?`` as in file names; the name of a submodule stands for all its
            parameters. The others are then constants. By default all trainable parameters are wanted.

    Attributes:
        names: One dotted name per tensor.
        tensors: The parameters themselves, not copies.
        others: Trainable parameters that are left out.
        numel: Length n of the flat vector.
        dtype: The one dtype they share, torch.float32 or torch.float64.
        device: The one device they share.

    Raises:
        UsageError: If nothing is trainable, the dtypes or devices differ or cannot be used, a pattern fits no name, or there is
            no pattern.

    Example:
        >>> import torch
        >>> parameters = Parameters(torch.nn.Linear(2, 3))
        >>> parameters.names, parameters.numel
        (('weight', 'bias'), 9)
        >>> Parameters(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)), "1").names
        ('1.weight', '1.bias')
    """

    def __init__(self, module: torch.nn.Module, only: str | Sequence[str] | None = None) -> None:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.others: tuple[Tensor, ...] = ()
        if only is not None:
            wanted = _matching(module, [only] if isinstance(only, str) else only)
            self.others = tuple(p for _, p in named if id(p) not in wanted)
            named = [(name, p) for name, p in named if id(p) in wanted]
        _check_usable(module, named)
        self.names: tuple[str, ...] = tuple(name for name, _ in named)
        self.tensors: tuple[Tensor, ...] = tuple(p for _, p in named)
        self.sizes: list[int] = [p.numel() for p in self.tensors]
        self.numel: int = sum(self.sizes)
        self.dtype: torch.dtype = self.tensors[0].dtype
        self.device: torch.device = self.tensors[0].device

    def facts(self) -> dict[str, str]:
        """What must be the same on all ranks: each parameter's dtype and shape, by name."""
        named = zip(self.names, self.tensors, strict=True)
        return {
            "number of parameters": str(len(self.names)),
            **{f"parameter {name!r}": f"{str(p.dtype).removeprefix('torch.')} {tuple(p.shape)}" for name, p in named},
        }

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat vector of shape (n,), each with the shape of its parameter."""
        # one call into torch; a Python loop over narrow() and view() costs as much as a small product
        return list(torch._utils._unflatten_dense_tensors(flat, self.tensors))

    def flatten(self, tensors: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
        """One flat vector of shape (n,) from one tensor per parameter, written to ``out`` where given."""
        return torch.cat([t.reshape(-1) for t in tensors], out=out)

    def read(self) -> Tensor:
        """A flat copy of the current values, shape (n,)."""
        return self.flatten([p.detach() for p in self.tensors])

    def read_all(self) -> Tensor:
        """The same, with the trainable parameters that are left out behind them."""
        return self.flatten([p.detach() for p in (*self.tensors, *self.others)])

    @torch.no_grad()
    def write(self, flat: Tensor) -> None:
        """Set the parameters in place from a flat vector of shape (n,)."""
        for p, piece in zip(self.tensors, self.split(flat), strict=True):
            p.copy_(piece)

    def check_vector(self, v: Tensor) -> None:
        """Raise ValueError unless ``v`` is flat, of length n, and of the parameters' dtype and device."""
        if v.shape != (self.numel,):
            raise ValueError(f"expected a vector of shape ({self.numel},), got {tuple(v.shape)}")
        if v.dtype != self.dtype or v.device != self.device:
            raise ValueError(
                f"expected a vector of {self.dtype} on {self.device}, got {v.dtype} on {v.device}; use v.to(...)"
            )

    def snapshot(self) -> Snapshot:
        """The current values and versions, to notice later that something moved."""
        return Snapshot(self)


class Snapshot:
    """Parameters as they were when a graph was built; a product on that graph is right only while they stay so."""

    def __init__(self, parameters: Parameters) -> None:
        self._names = parameters.names
        self._tensors = (*parameters.tensors, *parameters.others)  # a graph is one of those left out, too
        self._marks = self._current_marks()
        self._values = [p.detach().clone() for p in self._tensors]
        # numpy compares large arrays several times faster than torch.equal
        self._pairs = (
            [(p.detach().numpy(), value.numpy()) for p, value in zip(self._tensors, self._values, strict=True)]
            if parameters.device.type == "cpu"
            else []
        )

    def check(self) -> None:
        """Raise StaleGraphError, naming the first parameter that has moved.

        In-place updates and replaced storage show in version counters and addresses. ``p.data.add_()`` shows
        in neither, so on CPU the values are compared as well; on a GPU that comparison would wait for the
        device and is left to :meth:`moved`, whose answer travels with the product.
        """
        marks = self._current_marks()
        if marks == self._marks and all((live == value).all() for live, value in self._pairs):
            return
        moved = [i for i, (now, mark) in enumerate(zip(marks, self._marks, strict=True)) if now != mark]
        moved += [i for i, (live, value) in enumerate(self._pairs) if not (live == value).all()]
        first = min(moved)
        which = f"parameter {self._names[first]!r}" if first < len(self._names) else "a parameter that was left out"
        raise StaleGraphError(
            f"{which} changed after the graph was built, so the graph's products "
            "are those of the old point; leave the operator (or call its close()) before moving parameters"
        )

    def moved(self) -> Tensor:
        """How many tensors hold other values than at the snapshot, as a 0-dim tensor on their device."""
        pairs = zip(self._tensors, self._values, strict=True)
        return torch.stack([(p.detach() != value).any() for p, value in pairs]).sum()

    def _current_marks(self) -> list[tuple[int, int]]:
        return [(p._version, p.data_ptr()) for p in self._tensors]


def _matching(module: torch.nn.Module, patterns: Sequence[str]) -> set[int]:
    """The ids of trainable parameters whose name, or another one of a tied parameter's, fits a pattern."""
    named = [(name, p) for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad]
    found: set[int] = set()
    if not patterns:
        raise UsageError("parameters names none; give names or patterns such as 'layers.2.*', or leave it out for all")
    for pattern in patterns:
        fits = {
            id(p)
            for name, p in named
            if fnmatch.fnmatchcase(name, pattern) or (pattern and name.startswith(pattern.rstrip(".") + "."))
        }
        if not fits:
            names = [name for name, _ in named]
            near = difflib.get_close_matches(pattern, names, 1) or names[:1]
            hint = f"; a name is {near[0]!r}" if near else ""
            raise UsageError(f"parameters {pattern!r} fits the name of no trainable parameter{hint}")
        found |= fits
    return found


def _check_usable(module: torch.nn.Module, named: list[tuple[str, torch.nn.Parameter]]) -> None:
    if not named:
        raise UsageError(f"{type(module).__name__} has no trainable parameter; set requires_grad on those to train")
    for name, p in named:
        if isinstance(p, torch.nn.parameter.UninitializedParameter):
            raise UsageError(f"parameter {name!r} is uninitialised; run the lazy module on one batch first")
        if type(p).__name__ == "DTensor" or type(p.data).__name__ == "DTensor":
            raise UsageError(
                f"parameter {name!r} is a DTensor; dhf reduces products itself: pass the module before it is sharded"
            )
        if p.dtype not in (torch.float32, torch.float64):
            raise UsageError(f"parameter {name!r} is {p.dtype}; dhf needs float32 or float64: use module.float()")
    for attribute in ("dtype", "device"):
        first, found = named[0][0], getattr(named[0][1], attribute)
        for name, p in named:
            if getattr(p, attribute) != found:
                raise UsageError(
                    f"parameters differ in {attribute}: {first!r} is {found} and {name!r} is {getattr(p, attribute)}; "
                    "use one for the whole module: module.to(...)"
                )
    if sum(p.numel() for _, p in named) == 0:
        raise UsageError(f"every trainable parameter of {type(module).__name__} is empty")
