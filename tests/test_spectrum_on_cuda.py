"""What is found of a spectrum on a GPU is what is found on the CPU: all random vectors are drawn there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

import dhf
from tests.models import problem, split


def everything(device: str) -> dict[str, Tensor]:
    """Numbers of every kind, on the CPU."""
    objective, batch = problem("mlp", "cross_entropy", weight_decay=0.01)
    objective.module.to(device)
    data: Any = tuple(t.to(device) for t in batch)
    with dhf.Hessian(objective, [data]) as A:
        pairs, diagonal = dhf.eigsh(A, 4, tol=1e-10), A.diagonal(products=24)
        density = dhf.spectral_density(A, samples=2, steps=6)
        values = scipy.sparse.linalg.eigsh(A.to_scipy(), k=3, v0=np.ones(43), return_eigenvectors=False)
        solutions = dhf.solve_many(A.shifted(3.0), torch.stack([A.gradient, A.gradient * 2], 1), rtol=1e-11)
        found = {
            "values": pairs.values,
            "vectors": pairs.vectors.cpu(),
            "trace": torch.tensor(A.trace(products=24).value),
            "diagonal": diagonal.values.cpu(),
            "density": torch.stack([density.nodes, density.weights]),
            "scipy": torch.from_numpy(values),
            "solutions": torch.stack([s.x.cpu() for s in solutions]),
        }
    queries = split(data, [1, 6])
    return found | {"scores": dhf.influence(objective, [data], queries, damping=0.1, rtol=1e-11).scores}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_what_the_cpu_finds() -> None:
    truth, found = everything("cpu"), everything("cuda")
    for name, value in truth.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
