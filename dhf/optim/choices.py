"""What settings stand for: the steering, the preconditioner, where vectors are held; and both in words."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable
from typing import Any

from dhf.comm import Communicator
from dhf.memory import total_memory
from dhf.optim.damping import LevenbergMarquardt, Nielsen
from dhf.optim.linearisation import MakePreconditioner
from dhf.optim.outcome import Steering
from dhf.optim.settings import Settings
from dhf.optim.trust_region import TrustRegion
from dhf.parameters import Parameters
from dhf.preconditioners import KFAC, Nystrom, empirical_fisher, jacobi

__all__ = ["choose_vectors", "in_words", "make_preconditioner", "make_steering", "name_of"]

_VECTORS = 20  # flat vectors that a step with replicated ones holds at most


def make_steering(settings: Settings) -> Steering:
    if settings.globalisation == "trust-region":
        return TrustRegion(settings.radius)
    if settings.globalisation == "nielsen":
        return Nielsen(settings.damping, smallest=settings.damping_smallest)
    return LevenbergMarquardt(settings.damping, factor=settings.damping_factor, smallest=settings.damping_smallest)


def make_preconditioner(settings: Settings, seed: int) -> MakePreconditioner | None:
    """What makes the preconditioner of each step; None for none."""
    if callable(settings.preconditioner):
        return settings.preconditioner
    refresh = settings.preconditioner_refresh
    makers: dict[str, Callable[[], MakePreconditioner | None]] = {
        "none": lambda: None,
        "jacobi": lambda: functools.partial(jacobi, seed=seed),
        "empirical-fisher": lambda: empirical_fisher,
        "kfac": lambda: KFAC(refresh=refresh or 2, seed=seed),
        "nystrom": lambda: Nystrom(rank=settings.preconditioner_rank, refresh=refresh, seed=seed),
    }
    return makers[settings.preconditioner]()


def choose_vectors(settings: Settings, parameters: Parameters, comm: Communicator) -> tuple[str, list[str]]:
    """Replicated or sharded vectors, and a note of why; by rank 0's memory, so that all ranks do alike. Collective."""
    needed = _VECTORS * parameters.numel * parameters.dtype.itemsize
    shares = comm.gather_objects((socket.gethostname(), total_memory(parameters.device)))
    ranks_here = sum(host == shares[0][0] for host, _ in shares)
    there = shares[0][1] / (1 if parameters.device.type == "cuda" else ranks_here)
    may = comm.size > 1 and settings.solver != "direct" and settings.reduce_dtype == "full"
    if may and needed > 0.25 * there:
        return "sharded", [f"vectors sharded: replicated ones would take {needed / 1e9:.1f} GB on each rank"]
    return "replicated", []


def name_of(preconditioner: Any) -> str:
    if callable(preconditioner):
        return getattr(preconditioner, "__qualname__", type(preconditioner).__qualname__)
    return str(preconditioner)


def in_words(settings: Settings) -> str:
    parts = [f"{settings.curvature} matrix", f"solver {settings.solver}"]
    if settings.solver not in ("auto", "direct"):
        parts.append(f"preconditioner {name_of(settings.preconditioner)}")
    return ", ".join([*parts, settings.globalisation.replace("-", " ")])
