"""Solvers for ``A x = b`` on any symmetric operator; they know neither autograd nor ranks."""

from dhf.solvers.cg import cg
from dhf.solvers.solution import Iterate, Iteration, Solution

__all__ = ["Iterate", "Iteration", "Solution", "cg"]
