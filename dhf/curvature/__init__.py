"""Rank-local products: what a curvature matrix does to a vector on one shard. Knows no ranks."""

from dhf.curvature.fisher import FisherGraph
from dhf.curvature.gauss_newton import GaussNewtonGraph
from dhf.curvature.gradient import GradientGraph
from dhf.curvature.hessian import HessianGraph
from dhf.curvature.non_finite import NonFinite, find_non_finite, places_in_words
from dhf.curvature.retention import Retention
from dhf.curvature.shard import Graph, ShardCurvature

__all__ = [
    "FisherGraph",
    "GaussNewtonGraph",
    "GradientGraph",
    "Graph",
    "HessianGraph",
    "NonFinite",
    "Retention",
    "ShardCurvature",
    "find_non_finite",
    "places_in_words",
]
