"""Solvers for ``A x = b`` on any symmetric operator; they know neither autograd nor ranks."""

from dhf.solvers.cg import cg
from dhf.solvers.cgls import cgls
from dhf.solvers.direct import Direct, direct
from dhf.solvers.forcing import forcing_term
from dhf.solvers.minres import minres
from dhf.solvers.solution import Iterate, Iteration, Solution
from dhf.solvers.steihaug import steihaug

__all__ = ["Direct", "Iterate", "Iteration", "Solution", "cg", "cgls", "direct", "forcing_term", "minres", "steihaug"]
