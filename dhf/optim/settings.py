"""Settings: the numbers of a Hessian-free optimizer, by kind of problem; what is not chosen comes from the preset.

    preset          for                                     curvature  solver        preconditioner  steered by
    deep-net        networks of layers, any loss            ggn        cg            kfac            Levenberg-Marquardt, grid
    least-squares   LeastSquares, or MSE in float64         ggn        direct, cgls  nystrom         Nielsen
    newton          other networks in float64               hessian    steihaug      none            trust region
    convex          a linear model with a convex loss       ggn        direct, cg    nystrom         Levenberg-Marquardt, Armijo

docs/settings.md has the same table with the reason for each number.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from dhf.curvature.retention import check_retain
from dhf.curvature.traced import PRODUCTS
from dhf.errors import UsageError
from dhf.losses import BinaryCrossEntropy, CrossEntropy, MeanSquaredError
from dhf.objective import LeastSquares, Objective

__all__ = [
    "CURVATURES",
    "GLOBALISATIONS",
    "LINE_SEARCHES",
    "PRECONDITIONERS",
    "PRESETS",
    "REDUCE_DTYPES",
    "SOLVERS",
    "VECTORS",
    "Settings",
    "choose_preset",
    "resolve",
]

CURVATURES = ("ggn", "hessian", "fisher")
PRECONDITIONERS = ("auto", "none", "jacobi", "empirical-fisher", "kfac", "nystrom")
SOLVERS = ("auto", "cg", "cgls", "direct", "minres", "steihaug")
GLOBALISATIONS = ("levenberg-marquardt", "nielsen", "trust-region")
LINE_SEARCHES = ("armijo", "grid")
VECTORS = ("auto", "replicated", "sharded")
REDUCE_DTYPES = ("full", "bfloat16")


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """Every number of a step.

    Attributes:
        curvature: ``"ggn"``, ``"hessian"`` or ``"fisher"``.
        solver: ``"cg"``, ``"cgls"``, ``"direct"``, ``"minres"`` or ``"steihaug"``; ``"auto"`` takes direct where it is cheaper.
        preconditioner: ``"none"``, ``"jacobi"``, ``"empirical-fisher"``, ``"kfac"`` or ``"nystrom"``.
        preconditioner_rank: Of nystrom.
        preconditioner_refresh: Steps between renewals of kfac and nystrom; None is 2 for kfac, and nystrom's own rule.
        globalisation: ``"levenberg-marquardt"``, ``"nielsen"`` or ``"trust-region"``.
        line_search: ``"armijo"`` or ``"grid"``, where steps are not taken whole.
        damping: First λ.
        damping_factor: Levenberg-Marquardt's factor on λ.
        damping_smallest: Least λ.
        radius: First radius of a trust region.
        cg_max_iterations: Most iterations of a solve.
        cg_rtol: Relative residual at which a solve stops.
        cg_forcing: Whether Eisenstat and Walker's forcing terms take the place of ``cg_rtol``.
        cg_progress_tolerance: Martens' relative-progress rule; None turns it off.
        warm_start_decay: A solve starts at this multiple of the last solution; 0 starts at zero.
        curvature_fraction: Share of the samples that curvature is taken on.
        vectors: ``"replicated"``, ``"sharded"``, or ``"auto"``: sharded where replicated ones would take much of the memory.
        bucket_mb: Megabytes from which on a product's all-reduce is cut into parts that start early; 0 for one at the end.
        products: ``"retained"``, ``"traced"``, ``"compiled"`` or ``"auto"``.
        reduce_dtype: ``"full"``, or ``"bfloat16"`` for the products of cg.
        retain: Which micro-batches keep their graphs: ``"all"``, ``"none"``, ``"auto"``, or bytes that graphs may take on a rank.
    """

    curvature: str = "ggn"
    solver: str = "cg"
    preconditioner: Any = "none"
    preconditioner_rank: int = 60
    preconditioner_refresh: int | None = None
    globalisation: str = "levenberg-marquardt"
    line_search: str = "armijo"
    damping: float = 1.0
    damping_factor: float = 1.5
    damping_smallest: float = 1e-12
    radius: float = 1.0
    cg_max_iterations: int = 250
    cg_rtol: float = 1e-3
    cg_forcing: bool = False
    cg_progress_tolerance: float | None = None
    warm_start_decay: float = 0.0
    curvature_fraction: float = 1.0
    vectors: str = "auto"
    bucket_mb: float = 0.0
    reduce_dtype: str = "full"
    products: str = "auto"
    retain: Any = "auto"


PRESETS = {
    "deep-net": Settings(
        preconditioner="kfac",
        line_search="grid",
        damping=1.0,
        damping_factor=2.0,
        damping_smallest=1e-4,
        cg_max_iterations=50,
        cg_rtol=0.5,
    ),
    "least-squares": Settings(
        solver="auto",
        preconditioner="nystrom",
        preconditioner_rank=60,
        globalisation="nielsen",
        damping=1e-3,
        damping_smallest=1e-15,
        cg_max_iterations=300,
        cg_rtol=1e-3,
    ),
    "newton": Settings(
        curvature="hessian", solver="steihaug", globalisation="trust-region", cg_max_iterations=250, cg_forcing=True
    ),
    "convex": Settings(
        solver="auto",
        preconditioner="nystrom",
        preconditioner_rank=60,
        damping=1e-3,
        damping_factor=10.0,
        damping_smallest=1e-15,
        cg_max_iterations=500,
        cg_forcing=True,
    ),
}


def choose_preset(objective: Objective) -> str:
    """The preset that ``"auto"`` stands for: by the objective, and for squared errors by the dtype."""
    known = objective.known_loss()
    float64 = next(objective.module.parameters()).dtype == torch.float64
    if isinstance(objective, LeastSquares) or (objective.is_least_squares and float64):
        return "least-squares"
    convex = isinstance(known, (BinaryCrossEntropy, CrossEntropy, MeanSquaredError))
    if convex and _is_linear(objective.module):
        return "convex"
    return "newton" if float64 else "deep-net"


def resolve(preset: str, objective: Objective, chosen: dict[str, Any]) -> tuple[str, Settings]:
    """The preset's name and its settings with those that were chosen (not None) in their place.

    Raises:
        UsageError: If a choice is unknown, out of range, or does not go with another.
    """
    if preset != "auto":
        _check_choice("preset", preset, ("auto", *PRESETS))
    name = choose_preset(objective) if preset == "auto" else preset
    given = {key: value for key, value in chosen.items() if value is not None}
    if given.get("preconditioner") == "auto":
        del given["preconditioner"]
    base = PRESETS[name]
    curvature = given.get("curvature", base.curvature)
    if curvature == "hessian":  # indefinite away from minima
        base = dataclasses.replace(base, solver="steihaug")
    elif base.curvature == "hessian":
        base = dataclasses.replace(base, solver="cg", preconditioner="kfac")
    elif base.solver == "auto":
        if curvature == "fisher" or given.get("curvature_fraction", 1.0) < 1:
            base = dataclasses.replace(base, solver="cg")
        elif "preconditioner" in given:  # direct would have no use for it
            base = dataclasses.replace(base, solver="cgls" if objective.is_least_squares else "cg")
    settings = dataclasses.replace(base, **given)
    if "globalisation" not in given:
        if settings.solver == "steihaug":
            settings = dataclasses.replace(settings, globalisation="trust-region")
        elif curvature == "hessian" or settings.globalisation == "trust-region":
            settings = dataclasses.replace(settings, globalisation="levenberg-marquardt")
    _check(settings, objective)
    return name, settings


def _check(s: Settings, objective: Objective) -> None:
    _check_choice("curvature", s.curvature, CURVATURES)
    _check_choice("solver", s.solver, SOLVERS)
    if not callable(s.preconditioner):
        _check_choice("preconditioner", s.preconditioner, PRECONDITIONERS)
    _check_choice("globalisation", s.globalisation, GLOBALISATIONS)
    _check_choice("line_search", s.line_search, LINE_SEARCHES)
    _check_choice("vectors", s.vectors, VECTORS)
    _check_choice("reduce_dtype", s.reduce_dtype, REDUCE_DTYPES)
    _check_choice("products", s.products, PRODUCTS)
    check_retain(s.retain)
    if not 0 <= s.bucket_mb < float("inf"):
        raise UsageError(f"bucket_mb must be finite and not negative, got {s.bucket_mb}")
    if s.reduce_dtype != "full" and (s.solver != "cg" or s.vectors == "sharded"):
        raise UsageError(
            f"reduce_dtype {s.reduce_dtype} is for the solver cg on replicated vectors, got solver {s.solver} and vectors "
            f"{s.vectors}"
        )
    if s.vectors == "sharded" and s.solver == "direct":
        raise UsageError("solver direct holds a dense matrix on every rank; leave vectors at auto, or use cg or cgls")
    for name in ("damping", "damping_factor", "damping_smallest", "radius"):
        value = getattr(s, name)
        if not 0 < value < float("inf"):
            raise UsageError(f"{name} must be positive and finite, got {value}")
    for name in ("cg_max_iterations", "preconditioner_rank", "preconditioner_refresh"):
        number = getattr(s, name)
        if number is not None and number < 1:
            raise UsageError(f"{name} must be at least 1, got {number}")
    if not s.damping_factor > 1:
        raise UsageError(f"damping_factor must be above 1, got {s.damping_factor}")
    if not 0 < s.curvature_fraction <= 1:
        raise UsageError(f"curvature_fraction must be in (0, 1], got {s.curvature_fraction}")
    if not 0 <= s.warm_start_decay <= 1:
        raise UsageError(f"warm_start_decay must be in [0, 1], got {s.warm_start_decay}")
    if not 0 <= s.cg_rtol < 1:
        raise UsageError(f"cg_rtol must be in [0, 1), got {s.cg_rtol}")
    if (s.solver == "steihaug") != (s.globalisation == "trust-region"):
        raise UsageError(
            f"a trust region and the solver steihaug go together, got solver {s.solver} with globalisation "
            f"{s.globalisation}; give solver steihaug alone"
        )
    if s.solver in ("cgls", "direct") and s.curvature != "ggn":
        raise UsageError(
            f"solver {s.solver} works on the Gauss-Newton matrix alone, got curvature {s.curvature}; use cg"
        )
    if s.solver == "cgls" and not objective.is_least_squares:
        raise UsageError(
            "solver cgls needs a sum of squares, and this objective has another loss; use dhf.LeastSquares or "
            "torch.nn.MSELoss, or solver cg"
        )
    if s.solver in ("cgls", "direct") and s.curvature_fraction < 1:
        raise UsageError(f"solver {s.solver} takes all samples; leave curvature_fraction at 1, or use cg")


def _is_linear(module: torch.nn.Module) -> bool:
    """Whether the outputs are affine in the parameters: one Linear layer, and nothing else with parameters or a bend."""
    leaves = [m for m in module.modules() if not list(m.children())]
    weighted = [m for m in leaves if list(m.parameters(recurse=False))]
    rest = [m for m in leaves if m not in weighted]
    return (
        len(weighted) == 1
        and isinstance(weighted[0], torch.nn.Linear)
        and all(isinstance(m, (torch.nn.Flatten, torch.nn.Identity)) for m in rest)
        and isinstance(module, (torch.nn.Linear, torch.nn.Sequential))
    )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} {value!r} is unknown; choose from {', '.join(choices)}")
