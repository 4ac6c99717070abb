"""FirstOrder: torch's Adam and L-BFGS over the reduced gradient, behind the same step(), for comparison."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import torch

from dhf.coordinator import Coordinator, capture
from dhf.errors import UsageError
from dhf.evaluation import stream_seed
from dhf.objective import Objective
from dhf.operator import loss_and_gradient
from dhf.optim.report import StepReport
from dhf.parameters import Parameters
from dhf.reason import Reason

__all__ = ["FirstOrder"]


class FirstOrder:
    """One of torch's own optimizers, given the global gradient of the same objective over the same ranks.

    Args:
        objective: What is minimised.
        coordinator: How ranks talk and agree.
        method: ``"adam"``, or ``"lbfgs"`` with strong-Wolfe line search.
        learning_rate: The method's own; by default 1e-3 for Adam and 1 for L-BFGS.
        seed: Names the random streams (dropout masks); the same on all ranks.
    """

    def __init__(
        self,
        objective: Objective,
        coordinator: Coordinator,
        *,
        method: str = "adam",
        learning_rate: float | None = None,
        seed: int = 0,
    ) -> None:
        self.objective, self.coordinator = objective, coordinator
        self.parameters = Parameters(objective.module)
        self._seed, self._steps = seed, 0
        self._method, self._learning_rate = method, learning_rate
        tensors = self.parameters.tensors
        self._optimizer: torch.optim.Optimizer
        if method == "adam":
            self._optimizer = torch.optim.Adam(tensors, lr=1e-3 if learning_rate is None else learning_rate)
        elif method == "lbfgs":
            self._optimizer = torch.optim.LBFGS(
                tensors,
                lr=1.0 if learning_rate is None else learning_rate,
                history_size=50,
                line_search_fn="strong_wolfe",
            )
        else:
            raise UsageError(f"method {method!r} is unknown; choose from adam, lbfgs")

    def step(self, batches: Iterable[Any]) -> StepReport:
        """One step of the method: one gradient for Adam, up to 20 iterations for L-BFGS."""
        began, waited = time.perf_counter(), self.coordinator.seconds_waiting
        shard, failure = capture(lambda: list(batches))
        facts = {
            "method": self._method,
            "learning rate": repr(self._learning_rate),
            "seed": repr(self._seed),
            "step": repr(self._steps),
        }
        self.coordinator.require_same(facts, failure=failure)
        assert shard is not None
        seed = stream_seed(self._seed, self._steps)
        seen: list[tuple[float, float]] = []

        def closure() -> float:
            # torch's line search compares losses; they are sums over ranks, so all ranks compare the same bits
            loss, gradient = loss_and_gradient(
                self.objective, shard, coordinator=self.coordinator, seed=seed, move_buffers=not seen
            )
            for p, g in zip(self.parameters.tensors, self.parameters.split(gradient), strict=True):
                p.grad = g.clone()
            seen.append((loss, float(torch.linalg.vector_norm(gradient.double()))))
            return loss

        before = self.parameters.read()
        try:
            self._optimizer.step(closure)
        except BaseException:
            self.parameters.write(before)
            raise
        self._steps += 1
        theta = self.parameters.read()
        _, apart = self.coordinator.synchronise(theta, [])
        if apart:
            self.parameters.write(theta)
        loss_after, _ = loss_and_gradient(self.objective, shard, coordinator=self.coordinator, seed=seed)
        loss, norm = seen[0]
        reason = Reason.STEP_ACCEPTED if norm else Reason.GRADIENT_ZERO
        seconds, waiting = time.perf_counter() - began, self.coordinator.seconds_waiting - waited
        return StepReport(reason, loss, loss_after, norm, 1.0, 0.0, math.nan, None, 0, len(seen), seconds, waiting)

    def state_dict(self) -> dict[str, Any]:
        """The method's own state, and the step number."""
        return {"optimizer": self._optimizer.state_dict(), "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of :meth:`state_dict`."""
        self._optimizer.load_state_dict(state_dict["optimizer"])
        self._steps = int(state_dict["steps"])
