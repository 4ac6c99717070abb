"""to_scipy: SciPy's solvers on dhf's operators."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

import dhf
from tests.models import LOSSES, dense_gauss_newton, dense_hessian, problem


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scipys_solvers_find_what_the_dense_matrix_has(dtype: torch.dtype) -> None:
    objective, batch = problem("mlp", "cross_entropy")
    H = dense_hessian(objective.module, batch, LOSSES["cross_entropy"][1]).numpy()
    G = dense_gauss_newton(objective.module, batch, LOSSES["cross_entropy"][1]).numpy()
    objective.module.to(dtype)
    batch = batch[0].to(dtype), batch[1]
    slack = 1e-8 if dtype == torch.float64 else 1e-4
    with dhf.Hessian(objective, [batch]) as A, dhf.GaussNewton(objective, [batch]) as B:
        linear = A.to_scipy()
        assert (linear.shape, linear.dtype) == ((43, 43), np.dtype(str(dtype).removeprefix("torch.")))
        values = scipy.sparse.linalg.eigsh(linear, k=4, which="LA", v0=np.ones(43), return_eigenvectors=False)
        np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(H)[-4:], rtol=slack, atol=slack)
        np.testing.assert_allclose(dhf.eigsh(A, 4).values.flip(0).numpy(), np.sort(values), rtol=slack, atol=slack)
        b = A.gradient.numpy()
        x, status = scipy.sparse.linalg.cg(B.shifted(0.1).to_scipy(), b, rtol=1e-10 if slack < 1e-6 else 1e-5)
        assert status == 0
        np.testing.assert_allclose(x, np.linalg.solve(G + 0.1 * np.eye(43), b), rtol=10 * slack, atol=10 * slack)
        np.testing.assert_allclose(linear @ np.eye(43)[:, :3], H[:, :3], rtol=slack, atol=slack)
        np.testing.assert_allclose(linear.T @ np.ones(43), H @ np.ones(43), rtol=slack, atol=slack)


def test_without_scipy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = problem("mlp", "mse")
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with dhf.Hessian(objective, [batch]) as A, pytest.raises(dhf.UsageError, match="pip install scipy"):
        A.to_scipy()
