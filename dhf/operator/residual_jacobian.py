"""ResidualJacobian: J and Jᵀ of a least-squares objective, for solvers that never form the residual from JᵀJ.

With the rows scaled by the square roots of their weights, the objective is ``½‖r(θ)‖² + ½ weight_decay ‖θ‖²`` and its
quadratic model around θ ``½‖r + J x‖² + ½ weight_decay ‖θ + x‖²``. Rows stay on the ranks that own the samples; what is summed
over ranks is a vector of parameters, and one number, ``‖J v‖²``, that rides along.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dhf.comm import Communicator
from dhf.coordinator import Verdict
from dhf.curvature import GaussNewtonGraph
from dhf.curvature.gauss_newton import GaussNewton
from dhf.curvature.shard import BuildGraph, Multiply
from dhf.curvature.traced import graph_builder
from dhf.errors import UsageError
from dhf.objective import Objective, require_objective
from dhf.operator.global_operator import GlobalOperator
from dhf.operator.reduction import Target
from dhf.reason import Reason

__all__ = ["ResidualJacobian"]


class ResidualJacobian(GlobalOperator):
    """The Gauss-Newton matrix ``JᵀJ + weight_decay·I`` with its factor's norms and residuals; what :func:`dhf.cgls` works on.

    Args:
        objective: A LeastSquares objective, or one with torch's MSELoss.
        batches: This rank's micro-batches.
        comm: How ranks talk; one process by default.
        products: As in :class:`dhf.Hessian`.
        build: Makes a GaussNewton graph, in place of ``products``.
        **options: ``seed``, ``coordinator``, ``move_buffers``, ``debug_nonfinite``, ``retain`` as in :class:`dhf.GlobalOperator`.

    Attributes:
        squared: ``vᵀAv`` of the last product, as a sum of squares over all rows; the same on every rank.

    Raises:
        UsageError: If the objective is not a sum of squares.
    """

    RIDERS = 1

    def __init__(
        self,
        objective: Objective,
        batches: Iterable[Any],
        *,
        comm: Communicator | None = None,
        products: str = "retained",
        build: BuildGraph | None = None,
        **options: Any,
    ) -> None:
        require_objective(objective)
        if not objective.is_least_squares:
            raise UsageError(
                f"cgls needs a sum of squares, and {type(objective).__name__} has another loss; use dhf.LeastSquares or "
                "torch.nn.MSELoss, or solve with cg"
            )
        self.squared = 0.0
        super().__init__(
            objective, batches, comm=comm, build=build or graph_builder(GaussNewtonGraph, products), **options
        )

    def apply(
        self, v: Tensor, proposal: Reason | None = None, failure: Exception | None = None, shift: float = 0.0
    ) -> tuple[Tensor, Verdict]:
        """``(A + shift·I) v`` as in :meth:`GlobalOperator.apply`, and :attr:`squared`, of A alone."""
        reduced = self._reduce(self._multiply, v, proposal, failure, [(v, self._decay), (v, shift)])
        self.squared = float(reduced.riders[0])
        if self._decay:
            self.squared += self._decay * self.space.dots((v, v))[0]
        return reduced.product, reduced.verdict

    def residual(
        self, x: Tensor, proposal: Reason | None = None, failure: Exception | None = None
    ) -> tuple[Tensor, Verdict]:
        """``-Jᵀ(r + J x) - weight_decay (θ + x)``, from rows: accurate where ``-∇f - A x`` would cancel."""

        def multiply(graph: GaussNewton, pieces: Sequence[Tensor], weight: float) -> Sequence[Tensor]:
            return graph.pull(-(graph.slope + graph.output_hessian(graph.push(pieces))))

        decay: list[tuple[Tensor, float]] = []
        if self._decay:
            decay = [(self.space.piece(self.parameters.read()) + x, -self._decay)]

        def work(v: Tensor | None, target: Target) -> None:
            with self.coordinator.phases("products"):
                self._rows(v, target, multiply)

        reduced = self._reduce(work, x, proposal, failure, decay)
        return reduced.product, reduced.verdict

    def _launch(self, v: Tensor | None, target: Target) -> None:
        def multiply(graph: GaussNewton, pieces: Sequence[Tensor], weight: float) -> Sequence[Tensor]:
            Jv = graph.push(pieces)
            half = graph.output_hessian(Jv)
            target.riders[0] += torch.dot(Jv.reshape(-1), half.reshape(-1)) * weight
            return graph.pull(half)

        self._rows(v, target, multiply)

    def _rows(self, v: Tensor | None, target: Target, multiply: Multiply) -> None:
        assert v is not None
        self.parameters.check_vector(v)
        self._open_shard().product(v, target.out, multiply, ready=target.ready)
