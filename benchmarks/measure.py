"""How the benchmarks measure: alternatives interleaved in one process, medians, raw JSON with its environment."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["allocated", "environment", "interleave", "parser", "ratio", "save"]

RESULTS = Path(__file__).parent / "results"


def interleave(
    alternatives: Mapping[Any, Callable[[], Any]],
    *,
    rounds: int,
    device: torch.device,
    prepare: Callable[[], Any] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, list[float]]:
    """Seconds per call of each alternative, taken in turn, ``rounds`` times after one uncounted round.

    The order turns by one each round, so that no alternative always follows the same one.
    """
    names = list(alternatives)
    seconds: dict[Any, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if prepare is not None:
                prepare()
            _wait(device)
            began = clock()
            alternatives[name]()
            _wait(device)
            if turn:
                seconds[name].append(clock() - began)
    return seconds


def ratio(seconds: Mapping[str, list[float]], above: str, below: str) -> float:
    """The median over rounds of ``above / below``, pair by pair."""
    return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))


def allocated(build: Callable[[], Any], use: Callable[[Any], Any]) -> tuple[int, int]:
    """Bytes on the CPU that what ``build`` returns holds, and those in use at the peak of ``use`` on it, above what was before.

    Counted in torch's own allocations, so that the numbers repeat; scratch memory of kernel libraries is not seen.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    gc.collect()
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        built = build()
        gc.collect()
        with torch.profiler.record_function(_BUILT):
            pass
        result = use(built)
        del result
    events = profile.profiler.kineto_results.events()
    border = next(e.start_ns() for e in events if e.name() == _BUILT)
    now = held = peak = 0
    for when, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += size
        if when < border:
            held = peak = now
        peak = max(peak, now)
    return held, peak


_BUILT = "built"


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "gpu": gpu,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that all benchmarks take."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments.add_argument("--threads", type=int, default=1, help="threads on the CPU (default 1)")
    arguments.add_argument("--rounds", type=int, default=15, help="counted rounds (default 15)")
    arguments.add_argument("--output", type=Path, help="JSON file (default results/NAME-DEVICE.json)")
    return arguments


def save(name: str, arguments: argparse.Namespace, payload: dict[str, Any]) -> Path:
    """Write the raw numbers beside those of the other benchmarks."""
    device = torch.device(arguments.device)
    path = arguments.output or RESULTS / f"{name}-{arguments.device}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(device), **payload}, indent=1) + "\n")
    return path


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
