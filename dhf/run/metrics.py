"""A step's line of the metrics: the report's numbers, the problem's own, and the loss on held-out data."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from dhf.coordinator import Coordinator
from dhf.errors import UsageError
from dhf.evaluation import evaluate, micro_batch_seeds
from dhf.optim import StepReport
from dhf.run.assembly import Parts
from dhf.run.schedule import Phase

__all__ = ["extra_metrics", "step_row"]


def step_row(step: int, phase: Phase, report: StepReport) -> dict[str, Any]:
    """What dhf itself tells of a step, the same on every rank but for the seconds."""
    solve = report.solve
    return {
        "step": step,
        "phase": phase.number,
        "optimizer": phase.config.optimizer,
        "loss": report.loss,
        "loss_after": report.loss_after,
        "gradient_norm": report.gradient_norm,
        "step_length": report.step_length,
        "damping": report.damping,
        "reduction_ratio": report.reduction_ratio,
        "products": report.products,
        "evaluations": report.evaluations,
        "gradient_equivalents": report.gradient_equivalents,
        "seconds": report.seconds,
        "reason": report.reason.name,
        "fallback": report.fallback,
        "radius": report.radius,
        "cg_iterations": solve.iterations if solve else 0,
        "cg_reason": solve.reason.name if solve else None,
        "cg_residual_norm": solve.residual_norm if solve else None,
        "cg_true_residual_norm": solve.true_residual_norm if solve else None,
        "non_finite_ranks": list(report.non_finite),
    }


def extra_metrics(parts: Parts, coordinator: Coordinator, taken_names: Container[str]) -> dict[str, float]:
    """The problem's own numbers, taken on rank 0, and the loss on held-out data, over all ranks; every rank calls it.

    Raises:
        UsageError: If a number of the problem's has a name that is taken.
    """
    objective, comm, metrics = parts.problem.objective, coordinator.comm, parts.problem.metrics

    def take() -> dict[str, float]:
        taken = {} if metrics is None or comm.rank else metrics(objective.module)
        for name in taken:
            if name in taken_names or name == "validation_loss":
                raise UsageError(f"the problem's metric {name!r} has the name of one of dhf's own; rename it")
        return {name: float(value) for name, value in taken.items()}

    extra = coordinator.attempt(take) if metrics is not None else {}
    if parts.validation is not None:
        held_out = parts.validation
        sums = coordinator.attempt(
            lambda: evaluate(
                objective,
                comm.device,
                held_out.batches(0),
                micro_batch_seeds(0, comm.rank, len(held_out.batches(0))),
            )
        )
        total, count = coordinator.reduce(sums)
        extra["validation_loss"] = total / count
    return extra
