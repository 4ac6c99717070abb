"""Optimizers: HessianFree, its damping and line search, and torch's own optimizers on the same footing."""

from dhf.optim.damping import LevenbergMarquardt, Nielsen
from dhf.optim.first_order import FirstOrder
from dhf.optim.hessian_free import HessianFree
from dhf.optim.report import StepReport
from dhf.optim.trust_region import TrustRegion

__all__ = ["FirstOrder", "HessianFree", "LevenbergMarquardt", "Nielsen", "StepReport", "TrustRegion"]
