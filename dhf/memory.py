"""Memory: what a device has, what this process may still take of it, what it has taken, and how running out shows."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["available_memory", "peak_memory", "ran_out_of_memory", "resident_memory", "total_memory"]

_UNLIMITED = 2**60  # control groups without a limit name a number of this size
_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def total_memory(device: torch.device) -> float:
    """The bytes that a device has in all."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):
        return math.inf


def available_memory(device: torch.device) -> float:
    """The bytes that may still be taken: of a GPU, those that torch holds without use included; of a host, by all its processes.

    On a host it is the least of what the kernel says is available, and what is left in the process's control groups (version 1
    or 2, file caches not counted) and in its address space, where that is limited. Infinity where nothing is known.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return max(0.0, min(_left_on_host(), _left_in_groups(), _left_of_address_space()))


def resident_memory() -> int:
    """The bytes of this process that are in memory now; 0 where that is not known."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held at once: by torch on a GPU, else resident ones of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that there was no memory left; torch's allocator on CPUs says it in a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error) if type(error) is RuntimeError else ""
    return any(words in text for words in ("DefaultCPUAllocator", "not enough memory", "out of memory", "bad_alloc"))


def _left_on_host() -> float:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return math.inf


def _left_in_groups() -> float:
    """What is left in the narrowest of the control groups that this process is in."""
    left = [math.inf]
    for folder, limit, used, cache in _control_groups():
        with contextlib.suppress(OSError, ValueError):
            most = (folder / limit).read_text().strip()
            if most == "max" or int(most) >= _UNLIMITED:
                continue
            taken = int((folder / used).read_text())
            with contextlib.suppress(OSError, ValueError, StopIteration):
                lines = (folder / "memory.stat").read_text().splitlines()
                taken -= next(int(line.split()[1]) for line in lines if line.split()[0] == cache)
            left.append(float(int(most) - taken))
    return min(left)


def _control_groups() -> Iterator[tuple[Path, str, str, str]]:
    """Each memory group above this process, with the names of its limit, its use and the part of that which is file cache."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, names = _GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = _GROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = root / path.strip("/")
        # in a container the path may be the host's, and the root the container's own
        for folder in [inner, *inner.parents]:
            if folder == root or root in folder.parents:
                yield (folder, *names)


def _left_of_address_space() -> float:
    try:
        import resource
    except ImportError:
        return math.inf
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return math.inf
    with contextlib.suppress(OSError):
        return float(limit - int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE"))
    return math.inf
