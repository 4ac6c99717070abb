"""Preconditioners for CG: one file each; a factory takes the undamped operator and the damping, and gives ``r -> z``."""

from dhf.preconditioners.jacobi import jacobi

__all__ = ["jacobi"]
