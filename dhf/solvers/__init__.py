"""Solvers for ``A x = b`` and ``A x = λ x`` on any symmetric operator; they know neither autograd nor ranks."""

from dhf.solvers.cg import cg
from dhf.solvers.cgls import cgls
from dhf.solvers.direct import Direct, direct
from dhf.solvers.eigsh import Eigenpairs, eigsh
from dhf.solvers.forcing import forcing_term
from dhf.solvers.many import solve_many
from dhf.solvers.minres import minres
from dhf.solvers.solution import Iterate, Iteration, Solution
from dhf.solvers.steihaug import steihaug

__all__ = [
    "Direct",
    "Eigenpairs",
    "Iterate",
    "Iteration",
    "Solution",
    "cg",
    "cgls",
    "direct",
    "eigsh",
    "forcing_term",
    "minres",
    "solve_many",
    "steihaug",
]
