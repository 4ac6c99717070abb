"""FirstOrder: torch's Adam and L-BFGS over the reduced gradient, behind the same step(), for comparison."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dhf.batches import micro_batches
from dhf.coordinator import Coordinator, capture
from dhf.errors import NonFiniteError, UsageError
from dhf.evaluation import moving_buffers, restore_buffers, stream_seed
from dhf.objective import Objective
from dhf.operator import loss_and_gradient, loss_at
from dhf.optim.report import StepReport, in_gradients
from dhf.parameters import Parameters
from dhf.reason import Reason

__all__ = ["FirstOrder"]

_HISTORY = 50  # pairs of vectors that L-BFGS keeps


class FirstOrder:
    """One of torch's own optimizers, given the global gradient of the same objective over the same ranks.

    L-BFGS has no tolerances of its own here, and starts anew where it no longer moves: torch's never leaves a direction that is
    not downhill.

    Args:
        objective: What is minimised.
        coordinator: How ranks talk and agree.
        method: ``"adam"``, or ``"lbfgs"`` with strong-Wolfe line search.
        learning_rate: The method's own; by default 1e-3 for Adam and 1 for L-BFGS.
        seed: Names the random streams (dropout masks); the same on all ranks.
        debug_nonfinite: Whether to search for the sample where a loss or gradient is not finite.

    Attributes:
        kept_vectors: Most flat vectors that the method keeps from step to step.
    """

    def __init__(
        self,
        objective: Objective,
        coordinator: Coordinator,
        *,
        method: str = "adam",
        learning_rate: float | None = None,
        seed: int = 0,
        debug_nonfinite: bool = False,
    ) -> None:
        self.objective, self.coordinator = objective, coordinator
        self.parameters = Parameters(objective.module)
        self._seed, self._steps, self._debug_nonfinite = seed, 0, debug_nonfinite
        self._method, self._learning_rate = method, learning_rate
        tensors = self.parameters.tensors
        self._optimizer: torch.optim.Optimizer
        self.kept_vectors = 2 if method == "adam" else 2 * _HISTORY + 2
        if method == "adam":
            self._optimizer = torch.optim.Adam(tensors, lr=1e-3 if learning_rate is None else learning_rate)
        elif method == "lbfgs":
            self._optimizer = torch.optim.LBFGS(
                tensors,
                lr=1.0 if learning_rate is None else learning_rate,
                history_size=_HISTORY,
                line_search_fn="strong_wolfe",
                tolerance_grad=0.0,
                tolerance_change=0.0,
            )
        else:
            raise UsageError(f"method {method!r} is unknown; choose from adam, lbfgs")

    def step(self, batches: Iterable[Any]) -> StepReport:
        """One step of the method: one gradient for Adam, up to 20 iterations for L-BFGS; and the loss where it ends.

        A step of L-BFGS that has not moved reports NO_DECREASE.

        Args:
            batches: This rank's micro-batches, as for :meth:`dhf.HessianFree.step`.

        Raises:
            UsageError, RanksDifferError, NonFiniteError, RankError, ReplicasDivergedError, CommunicationError: On every
                rank alike; the parameters are then as they were.
        """
        began, waited = time.perf_counter(), self.coordinator.seconds_waiting
        self.coordinator.phases.begin()
        shard, failure = capture(lambda: micro_batches(batches))
        facts = {
            "method": self._method,
            "learning rate": repr(self._learning_rate),
            "seed": repr(self._seed),
            "step": repr(self._steps),
        }
        self.coordinator.require_same(facts, failure=failure)
        assert shard is not None
        seed = stream_seed(self._seed, self._steps)
        before = self.parameters.read()
        buffers = moving_buffers(self.objective.module)
        kept = [b.clone() for b in buffers]
        try:
            seen = self._move(shard, seed)
            theta = self.parameters.read()
            _, apart = self.coordinator.synchronise(theta, [])
            if apart:
                self.parameters.write(theta)
            loss_after = self._loss(shard, seed, theta)
        except BaseException:
            self.parameters.write(before)
            restore_buffers(buffers, kept)
            raise
        self._steps += 1
        loss, norm = seen[0]
        moved = not torch.equal(before, theta)
        if norm and not moved:
            self._optimizer.state.clear()
        reason = Reason.GRADIENT_ZERO if not norm else Reason.STEP_ACCEPTED if moved else Reason.NO_DECREASE
        profile = self.coordinator.phases.end()
        seconds, waiting = time.perf_counter() - began, self.coordinator.seconds_waiting - waited
        return StepReport(
            reason,
            loss,
            loss_after,
            norm,
            float(moved),
            0.0,
            math.nan,
            None,
            0,
            len(seen),
            seconds,
            waiting,
            gradient_equivalents=in_gradients(len(seen), values=1),
            profile=profile,
        )

    def _move(self, shard: Sequence[Any], seed: int) -> list[tuple[float, float]]:
        """Let torch's optimizer take its step; the losses and gradient norms that it has asked for."""
        seen: list[tuple[float, float]] = []

        def closure() -> float:
            # torch's line search compares losses; they are sums over ranks, so all ranks compare the same bits
            loss, gradient = loss_and_gradient(
                self.objective,
                shard,
                coordinator=self.coordinator,
                seed=seed,
                move_buffers=not seen,
                debug_nonfinite=self._debug_nonfinite,
            )
            for p, g in zip(self.parameters.tensors, self.parameters.split(gradient), strict=True):
                p.grad = g.clone()
            seen.append((loss, float(torch.linalg.vector_norm(gradient.double()))))
            return loss

        try:
            self._optimizer.step(closure)
        finally:
            self._optimizer.zero_grad()
        return seen

    def _loss(self, shard: Sequence[Any], seed: int, theta: Tensor) -> float:
        """The global objective at the parameters, by forward passes alone."""
        loss = loss_at(theta, self.objective, shard, self.coordinator, seed=seed)
        if not math.isfinite(loss):
            raise NonFiniteError(f"a step of {self._method} led to a loss of {loss}; use a smaller learning rate")
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The method's own state, and the step number."""
        return {"optimizer": self._optimizer.state_dict(), "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of :meth:`state_dict`."""
        self._optimizer.load_state_dict(state_dict["optimizer"])
        self._steps = int(state_dict["steps"])
