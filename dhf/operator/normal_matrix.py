"""NormalMatrix: the Gauss-Newton matrix of few parameters or few samples, formed from the Jacobian's rows of all ranks.

    in parameter space    G = Σ_i Jᵢᵀ ∇²ℓᵢ Jᵢ / N     n x n, for any loss with a known output Hessian
    in sample space       K = R Rᵀ, G = RᵀR            m x m, for sums of squares: R holds the scaled rows of all residuals

Every rank differentiates its own samples, one by one in one vectorised call. In parameter space its part of G is summed over
ranks; in sample space the rows are, and each rank then multiplies its own by all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import vmap

from dhf.curvature.gradient import scalar_loss
from dhf.curvature.per_sample import output_jacobian
from dhf.curvature.shard import MicroBatch
from dhf.errors import UsageError
from dhf.losses import OutputHessian
from dhf.objective import Objective, select
from dhf.operator.global_operator import GlobalOperator

__all__ = ["NormalMatrix"]

_BLOCK = 256
_CHUNK_BYTES = 2**28  # of rows held at once where they are added up


class NormalMatrix:
    """``G + weight_decay·I`` and the right-hand side ``-∇f``, dense.

    Args:
        operator: Any operator of the objective at this point; only its loss, gradient and data are used.
        in_samples: Whether to form the matrix in sample space.
        verify: Whether to compare the outputs of single samples with those of the batch.

    Attributes:
        matrix: G, shape (n, n), or K, shape (m, m).
        rows: R, shape (m, n), or None in parameter space.
        right_rows: y with ``Rᵀy + right = -∇f``, shape (m,), or None in parameter space.
        right: The part of ``-∇f`` that is no combination of rows, shape (n,).
        shift: Weight decay, to be added to the diagonal of G.

    Raises:
        PerSampleError: If the outputs cannot be differentiated sample by sample.
        UsageError: If the loss has no known output Hessian, or, in sample space, is no sum of squares.
    """

    def __init__(self, operator: GlobalOperator, *, in_samples: bool, verify: bool = True) -> None:
        objective = operator.objective
        if in_samples and not objective.is_least_squares:
            raise UsageError(
                f"direct needs a sum of squares, and {type(objective).__name__} has another loss; solve with cg"
            )
        self.shift = objective.weight_decay
        self.gradient = operator.gradient
        self._operator, self._verify = operator, verify
        self.rows: Tensor | None = None
        self.right_rows: Tensor | None = None
        if in_samples:
            self._form_in_samples()
        else:
            self.right = -self.gradient
            n = operator.shape[0]
            (self.matrix,) = operator.sums(self._add_gram, [(n, n)])

    def _form_in_samples(self) -> None:
        operator = self._operator
        width, m = operator.outputs_per_row, sum(operator.rows)
        found = operator.sums(self._add_rows, [(m, width, operator.shape[0]), (m, width)])
        self.rows, self.right_rows = found[0].flatten(0, 1), found[1].flatten()
        self.right = operator.parameters.read().mul_(-self.shift) if self.shift else torch.zeros_like(self.gradient)
        rows, rank = self.rows, operator.comm.rank
        mine = slice(width * sum(operator.rows[:rank]), width * sum(operator.rows[: rank + 1]))

        def add(part: MicroBatch, out: Sequence[Tensor]) -> None:
            if part.first_row == sum(operator.rows[:rank]):  # once, with the first micro-batch
                if operator.comm.size == 1:
                    _gram(rows, out[0])
                else:
                    torch.matmul(rows[mine], rows.T, out=out[0][mine])

        (self.matrix,) = operator.sums(add, [(len(rows), len(rows))])

    def _add_gram(self, part: MicroBatch, out: Sequence[Tensor]) -> None:
        objective, parameters = self._operator.objective, self._operator.parameters
        n, width = parameters.numel, self._operator.outputs_per_row
        step = max(1, _CHUNK_BYTES // (8 * n * width))
        whole = objective.count(part.batch)
        for first in range(0, part.rows, step):
            piece = part.batch if step >= part.rows else select(part.batch, slice(first, first + step))
            count = objective.count(piece)
            if count == 0:  # what counts nothing may have no mean loss
                continue
            J, z = output_jacobian(objective, parameters, piece, width=width, verify=self._verify)
            hessian = _output_hessian(objective, z, piece)
            weight = part.weight * count / whole
            rows = J.view(-1, n)
            if objective.is_least_squares:  # whose output Hessian is a multiple of the identity
                out[0].addmm_(rows.T, rows, alpha=weight * _multiple(hessian, z))
            else:
                out[0].addmm_(rows.T, _columns(hessian, J, z), alpha=weight)

    def _add_rows(self, part: MicroBatch, out: Sequence[Tensor]) -> None:
        objective, parameters = self._operator.objective, self._operator.parameters
        J, z = output_jacobian(
            objective, parameters, part.batch, width=self._operator.outputs_per_row, verify=self._verify
        )
        hessian = _output_hessian(objective, z, part.batch)
        h = _multiple(hessian, z)
        place = slice(part.first_row, part.first_row + part.rows)
        out[0][place] = J.mul_((h * part.weight) ** 0.5)
        out[1][place] = -_slope(objective, z, part.batch).view(J.shape[:2]) * (part.weight / h) ** 0.5


def _output_hessian(objective: Objective, z: Tensor, batch: object) -> OutputHessian:
    known = objective.output_hessian(z, batch)
    if known is None:
        raise UsageError(
            f"direct needs a loss with a known output Hessian, and {type(objective).__name__} has another; solve with cg"
        )
    return known


def _gram(rows: Tensor, out: Tensor) -> None:
    """``R Rᵀ`` into ``out``, of which little more than half is computed: a block of rows with those from it on."""
    for first in range(0, len(rows), _BLOCK):
        block = slice(first, first + _BLOCK)
        torch.matmul(rows[block], rows[first:].T, out=out[block, first:])
        out[first + _BLOCK :, block] = out[block, first + _BLOCK :].T


def _multiple(hessian: OutputHessian, z: Tensor) -> float:
    return float(hessian(torch.ones_like(z)).flatten()[0]) if z.numel() else 1.0


def _columns(hessian: OutputHessian, J: Tensor, z: Tensor) -> Tensor:
    """The output Hessian times every column of J, shape (N·k, n)."""
    per_column = vmap(lambda column: hessian(column.view(z.shape)).reshape(J.shape[:2]), in_dims=2, out_dims=2)
    return per_column(J).reshape(-1, J.shape[2])


def _slope(objective: Objective, z: Tensor, batch: object) -> Tensor:
    """``∇ℓ(z)`` of the mean loss."""
    with torch.enable_grad():
        at = z.detach().requires_grad_(True)
        return torch.autograd.grad(scalar_loss(objective, at, batch), at)[0]
