"""NaN in one rank's part of a product ends the solve on all ranks at the same iteration, by name, with the best iterate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dhf
from dhf.comm import Communicator
from dhf.curvature import NonFinite
from tests.faults.faulty import Faulty, Trap
from tests.faults.forked import run
from tests.ranks import ranks


def solve(comm: Communicator, bad: int, product: int) -> tuple[dhf.Solution, list[int]]:
    generator = torch.Generator().manual_seed(comm.rank)
    x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (6,), generator=generator)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    objective = Faulty(module, "product", Trap("poison", 0.0) if comm.rank == bad else None, 0, product)
    objective.step = 0  # the trap waits for step 1, which is the graph built next
    with dhf.GaussNewton(objective, [(x, y)], comm=comm) as A:
        return dhf.cg(A.shifted(1e-3), A.gradient, rtol=1e-12), list(A.non_finite)


@pytest.mark.parametrize("product", [1, 2, 5])
@pytest.mark.parametrize("bad", range(4))
def test_all_ranks_stop_at_the_same_iteration_with_the_best_iterate(bad: int, product: int) -> None:
    whole = ranks(4, solve, bad=-1, product=product)[0][0]
    for solution, named in ranks(4, solve, bad=bad, product=product):
        assert solution.reason is dhf.Reason.NON_FINITE
        assert named == [bad]
        assert solution.iterations == product - 1
        assert torch.isfinite(solution.x).all()
        # the iterate before the broken product is that of the unbroken solve, to the last bit
        assert solution.model == whole.history[product - 1].model


class Powers(nn.Module):
    """Outputs x·w, and beside them a loss Σ|z|^p, whose derivatives at z = 0 are infinite from some order on."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


def search(comm: Communicator, power: float, bad: int, row: int) -> tuple[str, dict[int, NonFinite | None]]:
    """A sample of zeros on one rank, in its second micro-batch."""
    x = torch.rand(20, 3, generator=torch.Generator().manual_seed(comm.rank), dtype=torch.float64) + 0.1
    if comm.rank == bad:
        x[10 + row] = 0.0
    objective = dhf.Objective(Powers(), lambda z, batch: z.abs().pow(power).mean())
    batches = [(x[:10], None), (x[10:], None)]
    try:
        with dhf.Hessian(objective, batches, comm=comm, debug_nonfinite=True) as A:
            A @ torch.ones(3, dtype=torch.float64)
            return "", A.non_finite
    except dhf.NonFiniteError as error:
        return str(error), {}


@pytest.mark.parametrize("row", [0, 3, 9])
@pytest.mark.parametrize(("power", "what"), [(-1.0, "loss"), (0.5, "gradient"), (1.5, "product")])
def test_the_sample_is_found(power: float, what: str, row: int) -> None:
    for text, _ in ranks(3, search, power=power, bad=2, row=row):
        assert f"from rank 2 (the {what} of sample {row} of micro-batch 1)" in text


FILE = """
import torch, dhf

class Powers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x @ self.w

def build(power: float) -> dhf.Problem:
    x = torch.rand(40, 3) + 0.1
    x[33] = 0.0
    return dhf.Problem(dhf.Objective(Powers(), lambda z, batch: z.abs().pow(power).mean()), (x, x))
"""


@pytest.mark.parametrize(
    ("power", "code", "words"), [(0.5, 2, "gradient not finite"), (1.5, 0, "a product is not finite")]
)
def test_the_trainer_names_the_sample_by_its_place_in_the_data(
    tmp_path: Path, power: float, code: int, words: str
) -> None:
    """On rank 2 of 3, in its second micro-batch."""
    (tmp_path / "powers.py").write_text(FILE)
    flags = ("--problem", f"{tmp_path}/powers.py:build", "--options.power", str(power), "--curvature", "hessian")
    flags = (*flags, "--steps", "2", "--micro-batch-size", "5", "--debug-nonfinite")
    said = run(3, tmp_path / "run", *flags, code=code).said(0)
    assert words in said
    assert "from rank 2 (the " in said
    assert " of sample 1 of micro-batch 1)" in said
    assert "; of rank 2 it is sample 33 of the data" in said


def test_a_step_with_such_a_product_changes_nothing_but_the_damping_and_the_run_goes_on(tmp_path: Path) -> None:
    """At step 2 the first product of rank 1 is NaN; step 3 is taken as usual."""
    flags = ("--options.fault", "poison", "--options.rank", "1", "--options.at", "2", "--options.product", "1")
    rows = run(3, tmp_path, "--steps", "3", *flags).rows()
    assert [row["cg_reason"] == "NON_FINITE" for row in rows] == [False, True, False]
    assert [row["non_finite_ranks"] for row in rows] == [[], [1], []]
    assert rows[1]["reason"] == "NO_DECREASE"
    assert rows[1]["loss_after"] == rows[1]["loss"] == rows[2]["loss"]
    assert rows[2]["damping"] > rows[1]["damping"]
    assert rows[2]["loss_after"] < rows[2]["loss"]
    assert (
        "warning: step 2: a product is not finite, from rank 1; --debug-nonfinite finds the sample"
        in (tmp_path / "out.0").read_text()
    )


def test_a_run_whose_products_are_never_finite_ends_as_diverged(tmp_path: Path) -> None:
    flags = ("--options.fault", "poison", "--options.rank", "1", "--options.at", "0", "--options.product", "1")
    ended = run(2, tmp_path, "--steps", "99", *flags, code=3)
    assert ended.result()["reason"] == "DIVERGED"


def test_a_trial_point_that_is_not_finite_is_rejected(tmp_path: Path) -> None:
    """In the line search of step 2 the loss of rank 1 is NaN at every trial point."""
    flags = ("--options.fault", "poison", "--options.rank", "1", "--options.at", "2", "--options.place", "search")
    rows = run(3, tmp_path, "--steps", "3", *flags).rows()
    assert rows[1]["reason"] == "NO_DECREASE"
    assert rows[2]["damping"] > rows[1]["damping"]
    assert rows[2]["loss"] == rows[1]["loss"]
    assert rows[2]["loss_after"] < rows[2]["loss"]
