"""What the presets stand for, and how a user's choices change them."""

import pytest
import torch
from torch import nn

import dhf
from dhf.optim.settings import PRESETS, resolve


def deep(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)


CHOICES = [
    (dhf.LeastSquares(deep()), "least-squares"),
    (dhf.LeastSquares(deep(torch.float64)), "least-squares"),
    (dhf.Objective(deep(torch.float64), nn.MSELoss()), "least-squares"),
    (dhf.Objective(deep(), nn.MSELoss()), "deep-net"),
    (dhf.Objective(deep(), nn.CrossEntropyLoss()), "deep-net"),
    (dhf.Objective(deep(torch.float64), nn.CrossEntropyLoss()), "newton"),
    (dhf.Objective(nn.Linear(2, 2), nn.CrossEntropyLoss()), "convex"),
    (dhf.Objective(nn.Sequential(nn.Flatten(), nn.Linear(2, 1).double()), nn.BCEWithLogitsLoss()), "convex"),
    (dhf.Objective(nn.Sequential(nn.Linear(2, 2), nn.Sigmoid()), nn.BCEWithLogitsLoss()), "deep-net"),
    (dhf.Objective(nn.Linear(2, 2), lambda z, batch: z.sin().mean()), "deep-net"),
]


@pytest.mark.parametrize(("objective", "expected"), CHOICES)
def test_auto_looks_at_the_objective_and_the_dtype(objective, expected):
    name, settings = resolve("auto", objective, {})
    assert name == expected
    assert settings == PRESETS[expected]


def test_what_is_chosen_takes_the_presets_place():
    objective = CHOICES[4][0]
    _, settings = resolve("auto", objective, {"damping": 3.0, "cg_rtol": None, "preconditioner": "auto"})
    assert (settings.damping, settings.cg_rtol, settings.preconditioner) == (3.0, 0.5, "kfac")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_true_hessian_goes_into_a_trust_region(preset):
    objective = dhf.LeastSquares(deep())
    _, settings = resolve(preset, objective, {"curvature": "hessian"})
    assert (settings.solver, settings.globalisation) == ("steihaug", "trust-region")
    _, settings = resolve(preset, objective, {"curvature": "hessian", "solver": "minres"})
    assert (settings.solver, settings.globalisation) == ("minres", "levenberg-marquardt")


def test_another_solver_than_the_trust_regions_is_steered_by_damping():
    objective = CHOICES[5][0]  # for which the preset is newton
    _, settings = resolve("auto", objective, {"solver": "cg"})
    assert (settings.curvature, settings.solver, settings.globalisation) == ("hessian", "cg", "levenberg-marquardt")
    _, settings = resolve("auto", objective, {"curvature": "ggn"})
    assert (settings.solver, settings.preconditioner, settings.globalisation) == ("cg", "kfac", "levenberg-marquardt")


def test_a_preconditioner_is_not_asked_for_in_vain():
    objective = dhf.LeastSquares(deep())
    assert resolve("auto", objective, {})[1].solver == "auto"
    assert resolve("auto", objective, {"preconditioner": "jacobi"})[1].solver == "cgls"
    assert resolve("auto", objective, {"curvature_fraction": 0.5})[1].solver == "cg"


def test_cgls_needs_a_sum_of_squares():
    with pytest.raises(dhf.UsageError, match=r"cgls needs a sum of squares.*or solver cg"):
        resolve("auto", CHOICES[4][0], {"solver": "cgls"})
