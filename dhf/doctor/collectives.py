"""Collectives, tried on the ranks that are there: their sums, their times, and what becomes of NaN."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch

from dhf.comm import Communicator
from dhf.coordinator import fingerprint
from dhf.doctor.finding import ERROR, Section

__all__ = ["try_collectives"]

_SIZES = (1, 1_000, 1_000_000)  # numbers in float64: a status word, a small net, a large one
_REPEATS = 5


def try_collectives(comm: Communicator) -> Section:
    """Sums, bits, NaN and times. Collective."""
    section = Section("collectives")
    if comm.size == 1:
        section.fact("all-reduce", "one process: nothing is sent")
    for numbers in _SIZES:
        _try_sum(section, comm, numbers)
    checks: list[tuple[str, Callable[[Communicator], bool], str]] = [
        ("same bits on all ranks", _same_bits, "all-reduce"),
        ("NaN reaches all ranks", _nan_spreads, "all-reduce of NaN"),
        ("pieces", _pieces, "reduce-scatter and all-gather"),
        ("broadcast", _broadcast, "broadcast"),
    ]
    for label, check, where in checks:
        good = all(comm.gather_objects(check(comm)))
        section.fact(label, "yes" if good else "NO")
        if not good:
            section.find(
                ERROR,
                f"{where} gives wrong results over {comm.backend}",
                where,
                f"use another --backend than {comm.backend}, and report it with the versions above",
            )
    return section


def _try_sum(section: Section, comm: Communicator, numbers: int) -> None:
    """The time of a sum, and whether it is right."""
    buffer = torch.empty(numbers, dtype=torch.float64, device=comm.device)
    times = []
    for _ in range(_REPEATS + 1):
        buffer.fill_(comm.rank + 1)
        comm.barrier()
        _wait(comm.device)
        began = time.perf_counter()
        comm.all_reduce(buffer)
        _wait(comm.device)
        times.append(time.perf_counter() - began)
    right = bool((buffer == comm.size * (comm.size + 1) / 2).all())
    everyone = comm.gather_objects((statistics.median(times[1:]), right))
    seconds, size = max(t for t, _ in everyone), 8 * numbers
    wrong = [rank for rank, (_, good) in enumerate(everyone) if not good]
    if comm.size > 1:
        rate = f", {size / seconds / 1e9:.2g} GB/s" if numbers >= 1_000 else ""
        section.fact("all-reduce", f"{numbers:,} number(s) in {_in_words(seconds)}{rate}")
    if wrong:
        section.find(
            ERROR,
            f"the sum of {numbers:,} numbers is wrong over {comm.backend}",
            f"rank {', '.join(map(str, wrong))}",
            f"use another --backend than {comm.backend}",
        )


def _same_bits(comm: Communicator) -> bool:
    buffer = torch.rand(1_000, dtype=torch.float64, generator=torch.Generator().manual_seed(comm.rank)).to(comm.device)
    comm.all_reduce(buffer)
    return len(set(comm.gather_objects(fingerprint(buffer)))) == 1


def _nan_spreads(comm: Communicator) -> bool:
    """Whether every rank sees the NaN of every other in a sum, beside numbers that stay as they are."""
    buffer = torch.zeros(comm.size + 1, dtype=torch.float64, device=comm.device)
    buffer[comm.rank] = float("nan")
    comm.all_reduce(buffer)
    return bool(torch.isnan(buffer[:-1]).all()) and float(buffer[-1]) == 0.0


def _pieces(comm: Communicator) -> bool:
    make = functools.partial(torch.arange, dtype=torch.float64, device=comm.device)
    whole, piece = make(3 * comm.size), torch.empty(3, dtype=torch.float64, device=comm.device)
    comm.reduce_scatter(whole, piece)
    again = torch.empty(3 * comm.size, dtype=torch.float64, device=comm.device)
    comm.all_gather(piece, again)
    return bool((again == make(3 * comm.size) * comm.size).all())


def _broadcast(comm: Communicator) -> bool:
    buffer = torch.full((3,), float(comm.rank), dtype=torch.float64, device=comm.device)
    comm.broadcast(buffer, comm.size - 1)
    return bool((buffer == comm.size - 1).all())


def _in_words(seconds: float) -> str:
    return f"{1e6 * seconds:.0f} µs" if seconds < 1e-3 else f"{1e3 * seconds:.3g} ms"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
