"""Problems: a model, its data and its objective; the built-in ones, and a user's own file."""

from dhf.problems.problem import Problem
from dhf.problems.registry import build_problem, problem_names
from dhf.problems.shards import Shard, shard

__all__ = ["Problem", "Shard", "build_problem", "problem_names", "shard"]
