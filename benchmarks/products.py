"""What a curvature product costs, by dhf and by what else offers one: time, build, memory, error, and what compiling repays.

    python benchmarks/products.py [--cases "deep autoencoder,PINN"] [--dtype float32] [--contenders NAMES] [--quick]
    python benchmarks/products.py --device cuda   # on a GPU, in seconds on the clock, on as many threads as there are
    python benchmarks/products.py --report        # writes page and picture again, from the numbers on disk

All contenders of a network are timed in turn in one process on one core, in its CPU seconds, on one batch, each with vectors
in its own form and the whole of its per-call work. g is one gradient (forward and backward) in the same turn. Before that each
must agree, on two vectors, with a float64 product by double backward. Attention uses the MATH kernel, which alone has second
derivatives.

On a CPU, what compiling costs is taken in processes of its own, with an empty cache and with a full one. On a GPU, convolutions
take no TF32, and recurrent layers no cuDNN, which has no second derivatives.

The numbers of a network and dtype replace those on disk; all others are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, allocated, environment, interleave
from networks import Case, autoencoder, cases, recurrent_cases
from product import GAUSS_NEWTON, HESSIAN, Product, Unavailable
from product_jax import jax_linearize
from product_peers import backpack, curvlinops, pyhessian, torchmin
from product_torch import compiled, functional, kept_vjp, launched, naive, retained, traced
from products_report import write_report
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_COMPILED = "dhf compiled"
_CPU = torch.device("cpu")
MATRICES = (HESSIAN, GAUSS_NEWTON)
CONTENDERS: dict[str, Callable[[Case, str], Product]] = {
    "rebuilt": naive,
    "dhf retained": retained,
    "dhf retained, launched": launched,
    "dhf traced": traced,
    _COMPILED: compiled,
    "curvlinops": curvlinops,
    "BackPACK": backpack,
    "PyHessian": pyhessian,
    "pytorch-minimize": torchmin,
    "torch.func": functional,
    "torch.func, vjp kept": kept_vjp,
    "JAX": jax_linearize,
}
PACKAGES = ("torch", "curvlinops-for-pytorch", "backpack-for-pytorch", "pyhessian", "pytorch-minimize", "jax")
# largest relative error, in the maximum norm, of a contender that computes the same matrix
TOLERANCES = {"float64": 1e-8, "float32": 1e-3}
NETWORKS = cases() | recurrent_cases()
SMALL = {"tiny autoencoder": lambda: autoencoder((12, 8, 4, 8, 12), 16)}


def subject(name: str, dtype: str, device: torch.device = _CPU) -> tuple[Case, list[Tensor], dict[str, list[Tensor]]]:
    """A network at its point, two vectors, and the products with them in float64 on a CPU."""
    torch.manual_seed(0)
    case = (NETWORKS | SMALL)[name]()
    vectors = [torch.randn(sum(p.numel() for p in case.module.parameters())) for _ in range(2)]
    exact = case.to(torch.float64)
    references = {}
    for matrix in MATRICES:
        product = naive(exact, matrix)
        results = [product.flatten(product.multiply(product.prepare(v.double()))) for v in vectors]
        references[matrix] = [result.to(device) for result in results]
    kind = getattr(torch, dtype)
    return case.to(kind, device), [v.to(device, kind) for v in vectors], references


@dataclasses.dataclass(frozen=True)
class Entrant:
    """A contender that computes the right matrix: its build, one that is ready, and the vector in its own form."""

    build: Callable[[], Product]
    product: Product
    v: Any


def measure(
    name: str,
    dtype: str,
    device: torch.device,
    contenders: list[str],
    rounds: int,
    refused: dict[tuple[str, str], str],
) -> dict[str, Any]:
    """All numbers of one network in one dtype; ``refused`` says why a contender is not to be tried with a matrix."""
    case, vectors, references = subject(name, dtype, device)
    tensors = list(case.module.parameters())
    found: dict[str, dict[str, dict[str, Any]]] = {who: {m: {} for m in MATRICES} for who in contenders}
    entrants: dict[tuple[str, str], Entrant] = {}
    for who in contenders:
        for matrix in MATRICES:
            if (who, matrix) in refused:
                found[who][matrix]["unavailable"] = refused[who, matrix]
                continue
            own = case.to(getattr(torch, dtype))  # its own module: what a contender does to it concerns no other
            build = functools.partial(CONTENDERS[who], own, matrix)
            product = _check(build, vectors, references[matrix], TOLERANCES[dtype], found[who][matrix])
            if product is not None:
                entrants[who, matrix] = Entrant(build, product, product.prepare(vectors[0]))

    def gradient() -> Any:
        return torch.autograd.grad(case.loss(case.module(case.inputs), case.targets), tensors, materialize_grads=True)

    products = {key: functools.partial(e.product.multiply, e.v) for key, e in entrants.items()}
    # CPU seconds of all threads, which one core holds: what other processes take meanwhile is not counted
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    timed = functools.partial(interleave, device=device, clock=clock)
    times = timed({"g": gradient, **products}, rounds=rounds)
    for entrant in entrants.values():
        entrant.product.close()
    builds = {key: functools.partial(_build_and_free, e.build) for key, e in entrants.items()}
    products.clear()
    entrants.clear()
    gc.collect()
    build_times = timed({"g": gradient, **builds}, rounds=max(2, rounds // 3))
    for (who, matrix), build in builds.items():
        entry = found[who][matrix]
        entry["seconds"], entry["build_seconds"] = times[who, matrix], build_times[who, matrix]
        if device.type == "cpu":
            entry["held"], entry["peak"] = _memory(build.args[0], vectors[0])
    return {
        "environment": environment(device),
        "versions": versions(),
        "parameters": sum(p.numel() for p in tensors),
        "gradient_seconds": times["g"],
        "gradient_seconds_among_builds": build_times["g"],
        "contenders": found,
    }


def _build_and_free(build: Callable[[], Product]) -> None:
    build().close()


def _check(
    build: Callable[[], Product],
    vectors: list[Tensor],
    references: list[Tensor],
    tolerance: float,
    entry: dict[str, Any],
) -> Product | None:
    """The product if it agrees with the references; otherwise notes why not."""
    try:
        began = time.perf_counter()
        product = build()
        product.multiply(product.prepare(vectors[0]))
        entry["first_seconds"] = time.perf_counter() - began  # with whatever is done once per process
        began = time.perf_counter()
        product.multiply(product.prepare(vectors[0]))
        entry["second_seconds"] = time.perf_counter() - began  # with whatever is done at the second product
        results = [product.flatten(product.multiply(product.prepare(v))).double() for v in vectors]
    except Unavailable as reason:
        entry["unavailable"] = str(reason)
        return None
    except Exception as error:  # whatever another package raises on a network it was not written for
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        entry["failed"] = f"{type(error).__name__}: {lines[0] if lines else ''}"
        return None
    errors = [float((got - ref).abs().max() / ref.abs().max()) for got, ref in zip(results, references, strict=True)]
    entry["error"] = max(errors)
    if not entry["error"] <= tolerance:
        entry["wrong"] = True
        product.close()
        return None
    return product


def _memory(build: Callable[[], Product], v: Tensor) -> tuple[int, int]:
    product: list[Product] = []

    def built() -> Product:
        product.append(build())
        return product[0]

    held, peak = allocated(built, lambda product: product.multiply(product.prepare(v)))
    if product[0].memory is not None:
        held, peak = product[0].memory()
    product[0].close()
    return held, peak


def compile_seconds(name: str, dtype: str, matrix: str, cache: str, limit: float) -> dict[str, Any]:
    """Seconds that compiling adds to a first build and product, with an empty cache and with a full one, or why it cannot."""
    found: dict[str, Any] = {}
    command = [sys.executable, __file__, "--compile-once", name, dtype, matrix]
    for state in ("cold", "warm"):
        started = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
            start_new_session=True,  # so that its compilers end with it
        )
        try:
            out, err = started.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            started.communicate()
            return {"refused": f"takes more than {limit:g} s to compile"}
        if started.returncode:
            return {"refused": (err.strip().splitlines() or [f"exit code {started.returncode}"])[-1]}
        first, second = json.loads(out.splitlines()[-1])
        found[state] = first - second
    return found


def compile_once(name: str, dtype: str, matrix: str) -> list[float]:
    """Seconds of a first build and product in this process, and of a second."""
    case, (v, _), _ = subject(name, dtype)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        product = compiled(case, matrix)
        product.multiply(v)
        seconds.append(time.perf_counter() - began)
        product.close()
    return seconds


@contextlib.contextmanager
def on_one_core() -> Iterator[None]:
    """Everything that this process starts inside runs on one core, also threads of libraries that take no orders."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def store(path: Path, name: str, dtype: str, entry: dict[str, Any]) -> None:
    """Put the numbers of one network and dtype into the file, and leave the rest as it is."""
    payload = json.loads(path.read_text()) if path.exists() else {"subjects": {}}
    payload["subjects"].setdefault(name, {})[dtype] = entry
    payload["subjects"] = {key: payload["subjects"][key] for key in NETWORKS | SMALL if key in payload["subjects"]}
    text = json.dumps(payload, indent=1)
    text = re.sub(r"\[([^\[\]{}]*)\]", lambda numbers: f"[{' '.join(numbers[1].split())}]", text)  # a list on one line
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def versions() -> dict[str, str | None]:
    """Of every package that competes; None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def main() -> None:
    """Measure what is asked for, and write the page."""
    arguments = _arguments()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=r"Using backward\(\) with create_graph")  # which is PyHessian's way
    torch.backends.cudnn.allow_tf32 = False
    with sdpa_kernel(SDPBackend.MATH):
        if arguments.compile_once:
            print(json.dumps(compile_once(*arguments.compile_once)))
            return
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = (
                cache  # what is compiled in a process of its own is found again here
            )
            for name in () if arguments.report else arguments.cases:
                for dtype in arguments.dtype:
                    began = time.perf_counter()
                    store(arguments.output, name, dtype, _subject_entry(name, dtype, arguments, cache))
                    print(f"{name}, {dtype}: {time.perf_counter() - began:.0f} s", flush=True)
    for path in write_report(arguments.output):
        print(f"written {path}")


def _subject_entry(name: str, dtype: str, arguments: argparse.Namespace, cache: str) -> dict[str, Any]:
    """The numbers of one network and dtype, those of compiling first, so that what takes too long is left out."""
    compiling: dict[str, dict[str, Any]] = {}
    device = torch.device(arguments.device)
    recurrent = name in recurrent_cases()
    if _COMPILED in arguments.contenders and device.type == "cpu":
        compiling = {m: compile_seconds(name, dtype, m, cache, arguments.compile_limit) for m in MATRICES}
    refused = {(_COMPILED, m): found["refused"] for m, found in compiling.items() if "refused" in found}
    rounds = 3 if arguments.quick else arguments.rounds
    on_core = on_one_core() if device.type == "cpu" else contextlib.nullcontext()
    with on_core, torch.backends.cudnn.flags(enabled=not recurrent, allow_tf32=False):
        entry = measure(name, dtype, device, arguments.contenders, rounds, refused)
    entry["compile_seconds"] = {m: found for m, found in compiling.items() if "refused" not in found}
    return entry


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def names(known: Any) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            unknown = set(text.split(",")) - set(known)
            if unknown:
                raise argparse.ArgumentTypeError(
                    f"{', '.join(sorted(unknown))} unknown; choose from {', '.join(known)}"
                )
            return text.split(",")

        return parse

    parser.add_argument(
        "--cases", type=names(NETWORKS | SMALL), default=list(NETWORKS), help=f"of {', '.join(NETWORKS)}"
    )
    parser.add_argument(
        "--dtype", type=names(TOLERANCES), default=list(TOLERANCES)[::-1], help="default float32,float64"
    )
    parser.add_argument(
        "--contenders", type=names(CONTENDERS), default=list(CONTENDERS), help=f"of {', '.join(CONTENDERS)}"
    )
    parser.add_argument("--rounds", type=int, default=15, help="counted rounds (default 15)")
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument(
        "--compile-limit", type=float, default=300.0, help="seconds after which a compilation is given up"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, help="JSON file, kept up to date (default results/products-DEVICE.json)")
    parser.add_argument("--report", action="store_true", help="run nothing; write page and picture from the JSON file")
    parser.add_argument("--compile-once", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.output = arguments.output or RESULTS / f"products-{arguments.device}.json"
    return arguments


if __name__ == "__main__":
    main()
