"""Operators: local curvature + communicator + coordinator, as symmetric operators on flat vectors."""

from dhf.operator.as_scipy import to_scipy
from dhf.operator.curvatures import Fisher, GaussNewton, Hessian, loss_and_gradient, loss_at
from dhf.operator.global_operator import GlobalOperator
from dhf.operator.normal_matrix import NormalMatrix
from dhf.operator.residual_jacobian import ResidualJacobian
from dhf.operator.shifted import Compressed, Shifted

__all__ = [
    "Compressed",
    "Fisher",
    "GaussNewton",
    "GlobalOperator",
    "Hessian",
    "NormalMatrix",
    "ResidualJacobian",
    "Shifted",
    "loss_and_gradient",
    "loss_at",
    "to_scipy",
]
