"""The examples: each trains by the command in its first lines, two ranks give what one gives, and the loss falls."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import quad

import dhf
from dhf.problems import Shard, build_problem
from dhf.problems.registry import _load
from dhf.train import main
from tests.ranks import ranks

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {
    "burgers_pinn": {"width": 8, "points": 8},
    "transformer_text": {"length": 12, "width": 8, "blocks": 1},
    "dict_batches": {"words": 70, "width": 8},
}
STEPS = 4


def train(comm, name: str) -> tuple[list[float], list[int], torch.Tensor]:
    """Losses, CG iterations and the parameters of a few steps, in float64, as dhf.train takes them."""
    torch.manual_seed(0)
    problem = build_problem(f"{EXAMPLES / name}.py:build", SMALL[name])
    problem.objective.module.double()
    shard = Shard(problem.train, comm.rank, comm.size, device=comm.device, dtype=torch.float64)
    optimizer = dhf.HessianFree(problem.objective, comm=comm)
    reports = [optimizer.step(shard.batches(step)) for step in range(STEPS)]
    theta = torch.nn.utils.parameters_to_vector(problem.objective.module.parameters()).detach()
    return [r.loss for r in reports] + [reports[-1].loss_after], [r.solve.iterations for r in reports], theta


@pytest.mark.parametrize("name", SMALL)
def test_two_ranks_give_what_one_gives_and_the_loss_falls(name):
    ((losses, iterations, theta),) = ranks(1, train, name=name)
    assert losses[-1] < 0.9 * losses[0]
    for found in ranks(2, train, name=name):
        assert found[0] == pytest.approx(losses, rel=1e-9)
        assert found[1] == iterations
        assert torch.allclose(found[2], theta, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", SMALL)
def test_the_command_of_each_example_runs(name, tmp_path, monkeypatch):
    for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    path = f"{EXAMPLES / name}.py"
    command = re.search(r"python -m dhf\.train --problem examples/(\S+):build --steps \d+", Path(path).read_text())
    assert command is not None
    assert command[1] == f"{name}.py"
    options = [f"--options.{key}={value}" for key, value in SMALL[name].items()]
    assert main(["--problem", f"{path}:build", *options, "--steps", "2", "--run-dir", str(tmp_path / "run")]) == 0
    torch.set_flush_denormal(False)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert rows[-1]["loss_after"] < rows[0]["loss"]
    expected = {"burgers_pinn": "relative_l2_error", "transformer_text": "validation_loss", "dict_batches": "accuracy"}
    assert np.isfinite(rows[-1][expected[name]])


def test_the_exact_solution_of_burgers_equation():
    example = _load(EXAMPLES / "burgers_pinn.py")
    nu, t = 0.05, 0.4
    x = np.array([-0.7, -0.05, 0.3])

    def by_adaptive_quadrature(x: float) -> float:
        def weight(eta: float) -> float:
            return np.exp(-np.cos(np.pi * (x - eta)) / (2 * np.pi * nu) - eta**2 / (4 * nu * t))

        above = quad(lambda eta: np.sin(np.pi * (x - eta)) * weight(eta), -3, 3, epsabs=0, epsrel=1e-11, limit=500)[0]
        return -above / quad(weight, -3, 3, epsabs=0, epsrel=1e-11, limit=500)[0]

    truth = [by_adaptive_quadrature(value) for value in x]
    assert example.cole_hopf(x, np.array([t]), nu)[:, 0] == pytest.approx(truth, rel=1e-8)


def test_the_residuals_of_burgers_equation():
    """Against a function whose derivatives are known, in the network's place."""
    example = _load(EXAMPLES / "burgers_pinn.py")

    class Known(torch.nn.Module):
        def forward(self, p: torch.Tensor) -> torch.Tensor:
            return (p[:, :1] ** 3) * torch.exp(p[:, 1:])

    p = torch.rand(6, 2, dtype=torch.float64)
    x, t = p.T
    u = x**3 * t.exp()
    values, inside = torch.randn(6, dtype=torch.float64), torch.tensor([True, True, True, True, False, False])
    equation = u + u * (3 * x**2 * t.exp()) - 0.1 * (6 * x * t.exp())
    truth = torch.where(inside, equation, 2.0 * (u - values))
    found = example.Burgers(Known(), 0.1, edge_weight=4.0).outputs((p, values, inside))
    assert torch.allclose(found, truth, rtol=1e-12)
