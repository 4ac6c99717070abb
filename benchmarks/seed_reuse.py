"""What keeping the gradient graph saves: five Hessian-vector products, the graph rebuilt each time or built once.

    python benchmarks/seed_reuse.py [--device cuda]

The toy is y = mean((w + x)(w + 1)) on vectors, once with z = Σ (dy/dw + dy/dx) differentiated five times, as the idea was
first told, and once with five random vectors. The networks, with random vectors, show what is left of the saving where
products are made of matrix multiplications. Each figure is the time with one build over the time with five, the median over
interleaved rounds.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measure import interleave, parser, ratio, save
from networks import Case, cases
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

PRODUCTS = 5


def toy(n: int, device: torch.device) -> tuple[Callable[[], Tensor], Sequence[Tensor]]:
    """The scalar function of two vectors of n elements, and the vectors."""
    w = torch.randn(n, device=device, requires_grad=True)
    x = torch.randn(n, device=device, requires_grad=True)
    return lambda: ((w + x) * (w + 1)).mean(), (w, x)


def network(case: Case, device: torch.device) -> tuple[Callable[[], Tensor], Sequence[Tensor]]:
    """The loss of a network on its batch, and its parameters."""
    module = case.module.to(device)
    inputs, targets = case.inputs.to(device), case.targets.to(device)
    return lambda: case.loss(module(inputs), targets), tuple(module.parameters())


def compare_sum(
    function: Callable[[], Tensor], tensors: Sequence[Tensor], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds for five derivatives of the gradient's sum, rebuilt and reused, round by round."""

    def build() -> Tensor:
        return sum(torch.autograd.grad(function(), tensors, create_graph=True)).sum()

    def rebuilt() -> list[Sequence[Tensor]]:
        return [torch.autograd.grad(build(), tensors) for _ in range(PRODUCTS)]

    def reused() -> list[Sequence[Tensor]]:
        z = build()
        return [torch.autograd.grad(z, tensors, retain_graph=True) for _ in range(PRODUCTS)]

    for a, b in zip(rebuilt(), reused(), strict=True):
        torch.testing.assert_close(a, b)
    return interleave({"rebuilt": rebuilt, "reused": reused}, rounds=rounds, device=device)


def compare(
    function: Callable[[], Tensor], tensors: Sequence[Tensor], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds for five products with random vectors, rebuilt and reused, round by round."""
    vs = [[torch.randn_like(t) for t in tensors] for _ in range(PRODUCTS)]

    def build() -> Sequence[Tensor]:
        return torch.autograd.grad(function(), tensors, create_graph=True, materialize_grads=True)

    def product(gradient: Sequence[Tensor], v: Sequence[Tensor], keep: bool) -> Sequence[Tensor]:
        curved = [(g, w) for g, w in zip(gradient, v, strict=True) if g.requires_grad]
        outputs, cotangents = zip(*curved, strict=True)
        return torch.autograd.grad(outputs, tensors, cotangents, retain_graph=keep, materialize_grads=True)

    def rebuilt() -> list[Sequence[Tensor]]:
        return [product(build(), v, keep=False) for v in vs]

    def reused() -> list[Sequence[Tensor]]:
        gradient = build()
        return [product(gradient, v, keep=True) for v in vs]

    for a, b in zip(rebuilt(), reused(), strict=True):
        torch.testing.assert_close(a, b)
    return interleave({"rebuilt": rebuilt, "reused": reused}, rounds=rounds, device=device)


def main() -> None:
    """Print the table and write the raw numbers."""
    arguments = parser(__doc__ or "").parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    sizes = (10_000, 1_000_000, 10_000_000)
    subjects: dict[str, tuple[Any, Any]] = {
        f"toy, {n:,} elements": (compare_sum, lambda n=n: toy(n, device)) for n in sizes
    }
    subjects |= {f"toy, {n:,}, random vectors": (compare, lambda n=n: toy(n, device)) for n in sizes}
    subjects |= {name: (compare, lambda make=make: network(make(), device)) for name, make in cases().items()}
    raw = {}
    print(
        f"{PRODUCTS} products, {device.type}, {arguments.threads} thread(s): time with one build / with {PRODUCTS} builds"
    )
    for name, (measure, make) in subjects.items():
        function, tensors = make()
        with sdpa_kernel(SDPBackend.MATH) if name == "transformer" else contextlib.nullcontext():
            seconds = measure(function, tensors, arguments.rounds, device)
        raw[name] = {"ratio": ratio(seconds, "reused", "rebuilt"), "seconds": seconds}
        milliseconds = {key: 1e3 * statistics.median(values) for key, values in seconds.items()}
        print(
            f"{name:<32} {raw[name]['ratio']:.2f}   "
            f"({milliseconds['reused']:.2f} ms against {milliseconds['rebuilt']:.2f} ms)",
            flush=True,
        )
    print(f"written {save('seed_reuse', arguments, {'products': PRODUCTS, 'subjects': raw})}")


if __name__ == "__main__":
    main()
