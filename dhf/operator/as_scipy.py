"""to_scipy: an operator as a SciPy LinearOperator, for SciPy's own solvers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dhf.coordinator import Coordinator, fingerprint
from dhf.errors import RanksDifferError, UsageError

__all__ = ["to_scipy"]


def to_scipy(operator: Any) -> Any:
    """A ``scipy.sparse.linalg.LinearOperator`` whose products are the operator's, from and to NumPy arrays.

    Every rank must call SciPy's solver with the same arguments, and SciPy's solvers know nothing of ranks: they stop by what each
    rank sees, which is the same on like machines. Give a start where SciPy would draw one, as ``v0`` of its ``eigsh``: each
    rank would draw its own.

    Args:
        operator: A GlobalOperator, or a shifted one, with replicated vectors.

    Returns:
        A LinearOperator of shape (n, n), in float32 or float64 as the operator. Its products raise RanksDifferError where ranks
        multiply different vectors (one small collective per product tells), and else what the operator raises.

    Raises:
        UsageError: If SciPy is not installed, or vectors are sharded.
    """
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError as error:
        raise UsageError("to_scipy needs SciPy: pip install scipy") from error
    root = getattr(operator, "operator", operator)  # of a shifted one
    if root.in_pieces:
        raise UsageError("to_scipy needs whole vectors, and these are sharded; leave vectors at replicated")
    coordinator: Coordinator = root.coordinator

    def multiply(x: np.ndarray) -> np.ndarray:
        v = torch.from_numpy(np.ascontiguousarray(x).reshape(-1)).to(operator.device, operator.dtype)
        if coordinator.comm.size > 1 and not coordinator.same(coordinator.reduce(coordinator.mark(fingerprint(v)))):
            raise RanksDifferError(
                0,
                "the ranks multiply different vectors: give SciPy's solver the same start (v0, x0) and arguments on all",
            )
        return operator.matvec(v).cpu().numpy()

    dtype = np.dtype(str(operator.dtype).removeprefix("torch."))
    return LinearOperator(operator.shape, matvec=multiply, rmatvec=multiply, dtype=dtype)
