"""influence: what each training sample does to the loss on queries, by one solve per query.

    θ(without i) - θ  ≈  c_i/N (H + μI)⁻¹ ∇ℓ_i                 c_i/N the weight of sample i in the mean loss, H the curvature

    score(q, i)  =  c_i/N ∇ℓ_i · s_q,        (H + μI) s_q = ∇L_q

to first order the rise of the query's loss were sample i's term left out of the mean (the others' weights as they are): positive
for samples that help, negative for those that harm.
A sample's own gradient is never formed: ``∇ℓ_i · s`` is the slope of its loss in its outputs times ``J_i s``, and J s is one
product for all samples of a micro-batch.

Source: Cook & Weisberg (1982); Koh & Liang, "Understanding black-box predictions via influence functions" (2017).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dhf.comm import Communicator
from dhf.coordinator import capture
from dhf.curvature import GaussNewtonGraph, GradientGraph
from dhf.curvature.shard import MicroBatch
from dhf.digest import digest
from dhf.errors import UsageError
from dhf.evaluation import reproducible, stream_seed, twice_differentiable
from dhf.objective import Objective
from dhf.operator import GaussNewton, GlobalOperator, Hessian
from dhf.solvers import Solution, cg, minres, solve_many

__all__ = ["Influence", "influence"]

_MATRICES: dict[str, Any] = {"ggn": GaussNewton, "hessian": Hessian}
Preconditioner = Callable[[GlobalOperator, float], Callable[[Tensor], Tensor]]


@dataclasses.dataclass(frozen=True, slots=True)
class Influence:
    """Scores of this rank's training samples, and the solves they come from.

    Attributes:
        scores: Shape (queries, samples of this rank), float64 on the CPU, in the units of the loss: the rise of each query's
            loss, to first order, were the sample left out. Samples stand in the order of the rank's micro-batches; those that
            count nothing have 0.
        first_row: The place of this rank's first sample among all.
        gradients: ∇L of each query, weight decay left out; shape (queries, n), the parameters' dtype and device.
        solutions: The solve for each query, with its reason and residuals.
    """

    scores: Tensor
    first_row: int
    gradients: Tensor
    solutions: list[Solution]

    @property
    def converged(self) -> bool:
        """Whether all solves did."""
        return all(solution.converged for solution in self.solutions)


def influence(
    objective: Objective,
    train: Iterable[Any],
    queries: Iterable[Any],
    *,
    comm: Communicator | None = None,
    curvature: str = "ggn",
    damping: float = 1e-3,
    solver: Callable[..., Solution] | None = None,
    rtol: float = 1e-6,
    max_iterations: int | None = None,
    preconditioner: Preconditioner | None = None,
    **options: Any,
) -> Influence:
    """Score training samples by what leaving each out would do to the loss on queries, at the module's parameters.

    Args:
        objective: What was minimised. A sample's loss must depend on its own row of the outputs alone.
        train: This rank's micro-batches of training samples.
        queries: Batches, the same on all ranks; the mean loss over each is one query. Give batches of one for single samples.
        comm: How ranks talk; one process by default.
        curvature: ``"ggn"`` or ``"hessian"``; the objective's weight decay is part of both.
        damping: μ, added to the diagonal; makes the matrix invertible where samples are fewer than parameters.
        solver: Called as ``solver(A, b, rtol=..., max_iterations=...)``, and ``preconditioner`` where given; :func:`dhf.cg` by
            default, and :func:`dhf.minres` for the Hessian, which may be indefinite.
        rtol: Of each solve.
        max_iterations: Of each solve; the solver's default if left out.
        preconditioner: Makes one from the operator and the damping, such as ``dhf.Nystrom()`` or ``dhf.KFAC()``.
        **options: Of the operator, such as ``parameters`` (one layer alone), ``products``, ``retain`` and ``seed``.

    Returns:
        An Influence. Where a solve has not converged its reason says so, and its scores are those of its last iterate.

    Raises:
        UsageError: If the curvature is unknown, there is no query, or the outputs have no row per sample.
        RanksDifferError: If ranks have different queries, as from a loader that shuffles.
        RankError: If code failed on a rank.

    Example:
        >>> import torch
        >>> x, y = torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[1.0], [4.0]]).double()
        >>> module = torch.nn.Linear(1, 1, bias=False).double()
        >>> _ = module.weight.data.fill_(1.8)  # the minimiser of mean (w x - y)², whose second derivative is 5
        >>> objective = Objective(module, torch.nn.MSELoss())
        >>> influence(objective, [(x, y)], [(x[1:], y[1:])], damping=0.0).scores  # the query is the second sample
        tensor([[-0.2560,  0.2560]], dtype=torch.float64)
    """
    if curvature not in _MATRICES:
        raise UsageError(f"curvature {curvature!r} is unknown; choose from {', '.join(_MATRICES)}")
    solve = solver or (minres if curvature == "hessian" else cg)
    asked, failure = capture(lambda: list(queries))
    content, failure = capture(lambda: digest(asked)) if failure is None else ("", failure)
    with _MATRICES[curvature](objective, train, comm=comm, **options) as A:
        facts = {"number of queries": str(len(asked or ())), "queries": f"hash {content}"}
        A.coordinator.require_same(facts, failure=failure)
        if not asked:
            raise UsageError("there is no query; give at least one batch")
        if A.in_pieces:
            raise UsageError("influence needs whole vectors, and these are sharded; leave vectors at replicated")
        gradients = _gradients(A, asked)
        settings: dict[str, Any] = {"rtol": rtol, "max_iterations": max_iterations}
        if preconditioner is not None:
            settings["preconditioner"] = preconditioner(A, damping)
        solutions = solve_many(A.shifted(damping), gradients.T, solver=solve, **settings)
        scores = _scores(A, [solution.x for solution in solutions])
        return Influence(scores, sum(A.rows[: A.comm.rank]), gradients, solutions)


def _gradients(A: GlobalOperator, queries: Sequence[Any]) -> Tensor:
    """∇L of each query, shape (queries, n); each is taken on one rank and told to all, so that all have the same bits."""
    objective, parameters, comm = A.objective, A.parameters, A.comm

    def own() -> Tensor:
        found = torch.zeros(len(queries), parameters.numel, dtype=A.dtype, device=A.device)
        for q in range(comm.rank, len(queries), comm.size):
            with (
                torch.enable_grad(),
                reproducible(objective, A.device, stream_seed(A.seed, q)),
                twice_differentiable(objective.module, A.device),
            ):
                parameters.flatten(GradientGraph(objective, parameters, queries[q]).gradient, out=found[q])
        return found

    return A.coordinator.total(own, (len(queries), parameters.numel), A.gradient)


def _scores(A: GlobalOperator, solutions: Sequence[Tensor]) -> Tensor:
    """``c_i/N ∇ℓ_i · s`` of this rank's samples, shape (queries, samples)."""
    rows = A.rows[A.comm.rank]
    scores = torch.zeros(len(solutions), rows, dtype=torch.float64)
    first = sum(A.rows[: A.comm.rank])
    pieces = [A.parameters.split(s) for s in solutions]

    def add(part: MicroBatch, _: Sequence[Tensor]) -> None:
        with torch.enable_grad():
            graph = GaussNewtonGraph(A.objective, A.parameters, part.batch)
        place = slice(part.first_row - first, part.first_row - first + part.rows)
        for q, s in enumerate(pieces):
            each = (graph.slope * graph.push(s)).reshape(part.rows, -1).sum(1, dtype=torch.float64)
            scores[q, place] = (each * part.weight).cpu()

    A.sums(add, [])
    return scores
