"""dhf: a distributed Hessian-free optimizer and curvature solver for PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dhf.version import __version__ as __version__

# name -> module; loaded on first use, so that `--help` need not import torch
_PUBLIC = {
    "BinaryCrossEntropy": "dhf.losses",
    "CommunicationError": "dhf.errors",
    "CrossEntropy": "dhf.losses",
    "DiagonalEstimate": "dhf.estimators",
    "Eigenpairs": "dhf.solvers",
    "Fisher": "dhf.operator",
    "GaussNewton": "dhf.operator",
    "GlobalOperator": "dhf.operator",
    "Hessian": "dhf.operator",
    "HessianFree": "dhf.optim",
    "Influence": "dhf.influence_functions",
    "KFAC": "dhf.preconditioners",
    "LeastSquares": "dhf.objective",
    "MeanSquaredError": "dhf.losses",
    "NonFiniteError": "dhf.errors",
    "Nystrom": "dhf.preconditioners",
    "Objective": "dhf.objective",
    "PerSampleError": "dhf.errors",
    "Problem": "dhf.problems",
    "RankError": "dhf.errors",
    "RanksDifferError": "dhf.errors",
    "Reason": "dhf.reason",
    "ReplicasDivergedError": "dhf.errors",
    "ResidualJacobian": "dhf.operator",
    "Solution": "dhf.solvers",
    "SpectralDensity": "dhf.estimators",
    "StaleGraphError": "dhf.errors",
    "StepReport": "dhf.optim",
    "TraceEstimate": "dhf.estimators",
    "UsageError": "dhf.errors",
    "cg": "dhf.solvers",
    "cgls": "dhf.solvers",
    "connect": "dhf.comm",
    "diagonal": "dhf.estimators",
    "direct": "dhf.solvers",
    "eigsh": "dhf.solvers",
    "empirical_fisher": "dhf.preconditioners",
    "forcing_term": "dhf.solvers",
    "influence": "dhf.influence_functions",
    "jacobi": "dhf.preconditioners",
    "minres": "dhf.solvers",
    "shard": "dhf.problems",
    "solve_many": "dhf.solvers",
    "spectral_density": "dhf.estimators",
    "steihaug": "dhf.solvers",
    "trace": "dhf.estimators",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from dhf.comm import connect as connect
    from dhf.errors import CommunicationError as CommunicationError
    from dhf.errors import NonFiniteError as NonFiniteError
    from dhf.errors import PerSampleError as PerSampleError
    from dhf.errors import RankError as RankError
    from dhf.errors import RanksDifferError as RanksDifferError
    from dhf.errors import ReplicasDivergedError as ReplicasDivergedError
    from dhf.errors import StaleGraphError as StaleGraphError
    from dhf.errors import UsageError as UsageError
    from dhf.estimators import DiagonalEstimate as DiagonalEstimate
    from dhf.estimators import SpectralDensity as SpectralDensity
    from dhf.estimators import TraceEstimate as TraceEstimate
    from dhf.estimators import diagonal as diagonal
    from dhf.estimators import spectral_density as spectral_density
    from dhf.estimators import trace as trace
    from dhf.influence_functions import Influence as Influence
    from dhf.influence_functions import influence as influence
    from dhf.losses import BinaryCrossEntropy as BinaryCrossEntropy
    from dhf.losses import CrossEntropy as CrossEntropy
    from dhf.losses import MeanSquaredError as MeanSquaredError
    from dhf.objective import LeastSquares as LeastSquares
    from dhf.objective import Objective as Objective
    from dhf.operator import Fisher as Fisher
    from dhf.operator import GaussNewton as GaussNewton
    from dhf.operator import GlobalOperator as GlobalOperator
    from dhf.operator import Hessian as Hessian
    from dhf.operator import ResidualJacobian as ResidualJacobian
    from dhf.optim import HessianFree as HessianFree
    from dhf.optim import StepReport as StepReport
    from dhf.preconditioners import KFAC as KFAC
    from dhf.preconditioners import Nystrom as Nystrom
    from dhf.preconditioners import empirical_fisher as empirical_fisher
    from dhf.preconditioners import jacobi as jacobi
    from dhf.problems import Problem as Problem
    from dhf.problems import shard as shard
    from dhf.reason import Reason as Reason
    from dhf.solvers import Eigenpairs as Eigenpairs
    from dhf.solvers import Solution as Solution
    from dhf.solvers import cg as cg
    from dhf.solvers import cgls as cgls
    from dhf.solvers import direct as direct
    from dhf.solvers import eigsh as eigsh
    from dhf.solvers import forcing_term as forcing_term
    from dhf.solvers import minres as minres
    from dhf.solvers import solve_many as solve_many
    from dhf.solvers import steihaug as steihaug


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dhf' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
