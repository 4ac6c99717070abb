"""Preconditioners, one file each.

A factory takes the undamped operator and the damping, and gives ``r -> z``, symmetric positive definite; where it keeps work from
one step to the next it is an object with ``state_dict`` and ``load_state_dict``.
"""

from dhf.preconditioners.empirical_fisher import empirical_fisher
from dhf.preconditioners.identity import identity
from dhf.preconditioners.jacobi import jacobi
from dhf.preconditioners.kfac import KFAC
from dhf.preconditioners.nystrom import Nystrom

__all__ = ["KFAC", "Nystrom", "empirical_fisher", "identity", "jacobi"]
