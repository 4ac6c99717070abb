"""1,000 solves with inner products that are off by one unit in the last place on one rank: one iteration everywhere."""

from __future__ import annotations

import random

import dhf
from dhf.comm import Communicator
from tests.distributed.test_agreement import Disturbed
from tests.models import problem
from tests.ranks import ranks

SOLVES = 1000


def disturbed_solves(comm: Communicator, disturbed: int) -> list[tuple[int, str, int]]:
    objective, batch = problem("mlp", "mse")
    found = []
    with dhf.GaussNewton(objective, [batch], comm=comm) as A:
        for seed in range(SOLVES):
            A.space = Disturbed(seed, 1 if comm.rank == disturbed else 0)
            draw = random.Random(seed)
            products = A.products
            # every other solve has a threshold that a residual of the undisturbed ranks meets to the last bit
            rtol, atol = 10.0 ** -draw.uniform(1, 6), 0.0
            if seed % 2:
                history = dhf.cg(A.shifted(1e-2), A.gradient, rtol=1e-7, max_iterations=8).history
                rtol, atol = 0.0, comm.gather_objects(history[draw.randint(1, len(history) - 1)].residual_norm)[0]
            solution = dhf.cg(A.shifted(1e-2), A.gradient, rtol=rtol, atol=atol, max_iterations=25)
            found.append((solution.iterations, solution.reason.name, A.products - products))
    return found


def test_one_iteration_everywhere() -> None:
    first, *others = ranks(2, disturbed_solves, disturbed=1, patience=200)
    assert len(first) == SOLVES
    assert all(other == first for other in others)
    assert len({iterations for iterations, _, _ in first}) > 5
