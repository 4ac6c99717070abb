"""What it costs to keep fewer graphs than a shard has, and whether memory stays within what was allowed.

    python benchmarks/retention.py

A shard of a deep autoencoder in micro-batches whose graphs would need four times the memory allowed. Products of all kept graphs,
of those that find room within the limit, and of none are timed in interleaved rounds. Then each is done in a process of its own,
whose resident memory is read before the operator is built and at its highest since: for a limit that was given, and for
``auto`` in an address space that is limited to as much.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from measure import interleave, parser, ratio, save
from networks import autoencoder

import dhf
from dhf.curvature import GaussNewtonGraph, HessianGraph, Retention
from dhf.curvature.rebuild import retained_bytes
from dhf.memory import peak_memory, resident_memory
from dhf.parameters import Parameters

WIDTHS = (784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784)
CURVATURES = {"Hessian": (dhf.Hessian, HessianGraph), "Gauss-Newton": (dhf.GaussNewton, GaussNewtonGraph)}
PRODUCTS = 3
SHARE = 0.25  # of the memory that all graphs need


def subject(arguments: argparse.Namespace) -> tuple[dhf.Objective, list[Any]]:
    """The objective and its micro-batches."""
    torch.manual_seed(0)
    size = arguments.micro_batch_size
    case = autoencoder(WIDTHS, size * arguments.micro_batches)
    batches = list(zip(case.inputs.split(size), case.targets.split(size), strict=True))
    return dhf.Objective(case.module, case.loss), batches


def needs(curvature: str, arguments: argparse.Namespace) -> int:
    """Bytes that all graphs need."""
    objective, batches = subject(arguments)
    build = CURVATURES[curvature][1]
    return retained_bytes(objective, Parameters(objective.module), batches[0], build) * len(batches)


def time_products(curvature: str, limit: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds per product, round by round, and how many graphs were kept."""
    objective, batches = subject(arguments)
    device, operator = torch.device(arguments.device), CURVATURES[curvature][0]
    policies: dict[str, Any] = {"all": "all", "limit": limit, "none": "none"}
    operators = {name: operator(objective, batches, retain=retain) for name, retain in policies.items()}
    v = torch.randn(operators["all"].shape[0])
    products = {name: A @ v for name, A in operators.items()}
    apart = {name: float((p - products["all"]).norm() / products["all"].norm()) for name, p in products.items()}
    seconds = interleave(
        {name: lambda A=A: A @ v for name, A in operators.items()}, rounds=arguments.rounds, device=device
    )
    return {
        "kept": {name: A.retained for name, A in operators.items()},
        "relative difference": apart,
        "seconds": seconds,
        "ratio": {name: ratio(seconds, name, "all") for name in policies},
    }


def resident(curvature: str, retain: str, bound: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Resident memory of a process that builds an operator and takes some products; ``bound`` limits its address space."""
    command = [sys.executable, __file__, "--worker", curvature, "--retain", retain, "--bound", str(bound)]
    for name in ("micro_batches", "micro_batch_size", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    return json.loads(done.stdout.splitlines()[-1])


def work(arguments: argparse.Namespace) -> None:
    """What such a process does."""
    objective, batches = subject(arguments)
    operator = CURVATURES[arguments.worker][0]
    with operator(objective, batches[:1], retain="none") as A:  # so that torch has loaded what it needs
        for _ in range(2):
            A @ torch.ones(A.shape[0])
    if arguments.bound:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + arguments.bound, taken + arguments.bound))
    given = arguments.retain
    retention = Retention(int(given) if given.isdigit() else given)
    before = resident_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the highest since now
    with operator(objective, batches, retain=retention) as A:
        kept = [A.retained]
        for _ in range(PRODUCTS):
            A @ torch.ones(A.shape[0])
        kept.append(A.retained)
    lines = Path("/proc/self/status").read_text().splitlines()
    highest = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    print(
        json.dumps(
            {
                "before": before,
                "highest": highest,
                "increase": highest - before,
                "kept": kept,
                "of": A.micro_batches,
                "budget": None if retention.budget in (None, float("inf")) else retention.budget,
                "vector": 4 * A.shape[0],
                "process peak": peak_memory(torch.device("cpu")),
            }
        )
    )


def main() -> None:
    """Print the table and write the raw numbers."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--micro-batches", type=int, default=32)
    arguments.add_argument("--micro-batch-size", type=int, default=512)
    arguments.add_argument("--worker", choices=list(CURVATURES), help=argparse.SUPPRESS)
    arguments.add_argument("--retain", default="all", help=argparse.SUPPRESS)
    arguments.add_argument("--bound", type=int, default=0, help=argparse.SUPPRESS)
    arguments = arguments.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.worker:
        work(arguments)
        return
    raw: dict[str, Any] = {}
    for curvature in CURVATURES:
        whole = needs(curvature, arguments)
        limit = int(SHARE * whole)
        timed = time_products(curvature, limit, arguments)
        memory = {
            name: resident(curvature, retain, 0, arguments)
            for name, retain in {"all": "all", "limit": str(limit), "none": "none"}.items()
        }
        memory["auto, address space bounded"] = resident(curvature, "auto", limit, arguments)
        memory["all, address space bounded"] = resident(curvature, "all", limit, arguments)
        raw[curvature] = {"needed": whole, "limit": limit, **timed, "memory": memory}
        print(f"{curvature}: graphs need {whole / 2**20:.0f} MiB, limit {limit / 2**20:.0f} MiB")
        for name in ("all", "limit", "none"):
            milliseconds = 1e3 * statistics.median(timed["seconds"][name])
            print(f"  {name:<6} kept {timed['kept'][name]:>2}  {milliseconds:7.1f} ms  {timed['ratio'][name]:.2f}")
        for name, found in memory.items():
            if "failed" in found:
                print(f"  {name}: {found['failed']}")
            else:
                print(f"  {name:<28} kept {found['kept']}  resident +{found['increase'] / 2**20:.0f} MiB")
    payload = {
        "micro_batches": arguments.micro_batches,
        "micro_batch_size": arguments.micro_batch_size,
        "subjects": raw,
    }
    print(f"written {save('retention', arguments, payload)}")


if __name__ == "__main__":
    main()
