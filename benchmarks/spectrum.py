"""What the ten largest eigenvalues of a network's Hessian cost, by dhf and by the packages for PyTorch that offer them.

    python benchmarks/spectrum.py [--rounds 15]

The subject is the built-in digits classifier in float32, after some steps of training. The reference is SciPy's ARPACK on
float64 products, to full accuracy. An error is the largest relative one of the ten eigenvalues, the median over ten seeds of the
start. For each target each contender is given the cheapest of its settings that meets it, found by trial; a user who does not
know the answer cannot do that for a search of fixed length. "default" is what it does when nothing is set. Then all are timed in
turn in one process on one core, in its CPU seconds, with everything that a call takes: graphs, search and vectors; each call has
the next seed.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy
import torch
from measure import interleave, parser, ratio, save
from torch import Tensor

import dhf
from dhf.problems import build_problem

K = 10
SEEDS = range(10)
TARGETS = (1e-2, 1e-3, 1e-4, 1e-5)
STEPS = {"after 5 steps": 5, "after 20 steps": 20}
OURS = "dhf"

Case = tuple[torch.nn.Module, torch.nn.Module, tuple[Tensor, Tensor]]
Search = Callable[[Case, Any, int], Tensor]  # case, setting, seed -> eigenvalues, largest first


def by_dhf(case: Case, setting: dict[str, Any], seed: int, products: str = "retained") -> Tensor:
    """dhf.eigsh on graphs that are kept."""
    module, loss, batch = case
    with dhf.Hessian(objective_of(module, loss), [batch], products=products) as A:
        return dhf.eigsh(A, K, seed=seed, **setting).values


@functools.cache
def objective_of(module: torch.nn.Module, loss: torch.nn.Module) -> dhf.Objective:
    """One for all calls, since a recording belongs to an objective."""
    return dhf.Objective(module, loss)


def by_pyhessian(case: Case, setting: dict[str, Any], seed: int) -> Tensor:
    """Power iteration with deflation, on a gradient graph that is kept."""
    from pyhessian import hessian

    module, loss, batch = case
    torch.manual_seed(seed)
    kept = hessian(module, loss, data=batch, cuda=False)
    values = kept.eigenvalues(top_n=K, **setting)[0]
    kept.gradsH.clear()
    for p in module.parameters():  # a gradient with a graph refers to its parameter, and the parameter to it
        p.grad = None
    return torch.tensor(sorted(values, reverse=True), dtype=torch.float64)


def by_eigenthings(case: Case, setting: dict[str, Any], seed: int) -> Tensor:
    """A Lanczos run of fixed length, with products whose graphs are built for each."""
    from hessian_eigenthings.algorithms.lanczos import lanczos
    from hessian_eigenthings.operators.hessian import HessianOperator

    module, loss, batch = case
    operator = HessianOperator(module, [batch], lambda m, b: loss(m(b[0]), b[1]))
    return lanczos(operator, k=K, which="LA", seed=seed, **setting).eigenvalues.double()


_TOLERANCES = [{"tol": float(f"{10 ** (-j / 6):.1e}"), "true_residual": False} for j in range(6, 31)]
_LENGTHS = [{"max_iterations": m, "tol": 0.0, "true_residual": False} for m in range(16, 100, 2)]
CONTENDERS: dict[str, tuple[Search, list[dict[str, Any]]]] = {
    OURS: (by_dhf, _TOLERANCES),
    "dhf, of fixed length": (by_dhf, _LENGTHS),
    "dhf, traced": (functools.partial(by_dhf, products="traced"), _TOLERANCES),
    "PyHessian": (by_pyhessian, [{"tol": t, "maxIter": 1000} for t in (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5, 1e-6)]),
    "hessian-eigenthings": (by_eigenthings, [{"max_iter": m} for m in range(16, 100, 2)]),
}
DEFAULTS: dict[str, dict[str, Any]] = {name: {} for name in (OURS, "PyHessian", "hessian-eigenthings")}


def subject(steps: int) -> tuple[Case, Tensor]:
    """The classifier after so many Hessian-free steps, and its ten largest eigenvalues."""
    torch.manual_seed(0)
    problem = build_problem("digits-classifier", {})
    images, labels = problem.train
    module, loss = problem.objective.module, torch.nn.CrossEntropyLoss()
    batch = images.to(torch.float32), labels
    optimizer = dhf.HessianFree(problem.objective)
    for _ in range(steps):
        optimizer.step([batch])
    values = reference(module, loss, batch)
    return (module, loss, batch), values


def reference(module: torch.nn.Module, loss: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """By ARPACK and double backward in float64, largest first; all of them are the largest in magnitude, too."""
    wide = module.double()
    tensors = tuple(wide.parameters())
    gradient = torch.autograd.grad(loss(wide(batch[0].double()), batch[1]), tensors, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])

    def multiply(v: np.ndarray) -> np.ndarray:
        product = torch.autograd.grad(flat, tensors, torch.from_numpy(v.reshape(-1).copy()), retain_graph=True)
        return torch.cat([p.reshape(-1) for p in product]).numpy()

    n = len(flat)
    linear = scipy.sparse.linalg.LinearOperator((n, n), matvec=multiply, dtype=np.float64)
    v0 = np.random.default_rng(0).standard_normal(n)
    values = scipy.sparse.linalg.eigsh(linear, k=K, which="LM", v0=v0, tol=0, ncv=60, return_eigenvectors=False)
    module.float()
    assert (values > 0).all(), "PyHessian finds the largest in magnitude; here some are negative"
    return torch.from_numpy(np.sort(values)[::-1].copy())


def error(found: Tensor, truth: Tensor) -> float:
    """The largest relative error of the ten; infinite where a search found fewer."""
    return float(((found - truth) / truth).abs().max()) if len(found) == K else float("inf")


def cheapest(case: Case, truth: Tensor, name: str) -> tuple[dict[float, dict[str, Any]], list[dict[str, Any]]]:
    """For each target the first setting that meets it, and what was tried; each takes more products than the one before."""
    search, settings = CONTENDERS[name]
    tried: list[dict[str, Any]] = []
    chosen: dict[float, dict[str, Any]] = {}
    for setting in settings:
        errors, began = [], time.process_time()
        for seed in SEEDS:
            errors.append(error(search(case, setting, seed), truth))
        tried.append({"setting": setting, "errors": errors, "seconds": (time.process_time() - began) / len(SEEDS)})
        if statistics.median(errors) <= TARGETS[-1] / 10:
            break
    for target in TARGETS:
        good = next((t["setting"] for t in tried if statistics.median(t["errors"]) <= target), None)
        if good is not None:
            chosen[target] = good
    return chosen, tried


def main() -> None:
    """Print the table and write the raw numbers."""
    arguments = parser(__doc__ or "").parse_args()
    torch.set_num_threads(arguments.threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    warnings.filterwarnings("ignore", message=r"Using backward\(\) with create_graph")  # which is PyHessian's way
    device, raw = torch.device("cpu"), {}
    for point, steps in STEPS.items():
        case, truth = subject(steps)
        entry: dict[str, Any] = {"reference": truth.tolist(), "targets": {}}
        chosen, entry["tried"] = {}, {}
        for name in CONTENDERS:
            chosen[name], entry["tried"][name] = cheapest(case, truth, name)
        print(
            f"digits classifier {point}: top {K} of {sum(p.numel() for p in case[0].parameters())} eigenvalues, "
            f"{float(truth[0]):.4g} to {float(truth[-1]):.4g}",
            flush=True,
        )
        for target in (*TARGETS, None):
            settings = DEFAULTS if target is None else {n: c[target] for n, c in chosen.items() if target in c}
            alternatives = {n: _call(CONTENDERS[n][0], case, settings[n]) for n in settings}
            errors = {
                n: statistics.median(error(CONTENDERS[n][0](case, settings[n], s), truth) for s in SEEDS)
                for n in settings
            }
            seconds = interleave(alternatives, rounds=arguments.rounds, device=device, clock=time.process_time)
            ahead = {n: ratio(seconds, n, OURS) for n in settings if n != OURS and OURS in settings}
            entry["targets"]["default" if target is None else f"{target:g}"] = {
                "settings": settings,
                "errors": errors,
                "seconds": seconds,
                "ahead": ahead,
            }
            print(f"  {'default settings' if target is None else f'error below {target:g}'}")
            for n in settings:
                over = f"{ahead[n]:6.2f} times ours" if n in ahead else ""
                print(
                    f"    {n:<20} {1e3 * statistics.median(seconds[n]):9.1f} ms  error {errors[n]:.1e}  {over}  {settings[n]}",
                    flush=True,
                )
            for n in set(CONTENDERS) - set(settings):
                print(f"    {n:<20} no setting tried reaches this")
        raw[point] = entry
    packages = {p: importlib.metadata.version(p) for p in ("PyHessian", "hessian-eigenthings", "scipy", "numpy")}
    print(f"written {save('spectrum', arguments, {'packages': packages, 'subjects': raw})}")


def _call(search: Search, case: Case, setting: dict[str, Any]) -> Callable[[], Tensor]:
    seeds = itertools.cycle(SEEDS)
    return lambda: search(case, setting, next(seeds))


if __name__ == "__main__":
    main()
