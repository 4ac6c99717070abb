"""Finding problems by name and in a user's file."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import dhf
from dhf.optim import StepReport
from dhf.problems import Shard, build_problem, problem_names
from tests.problems.idx import write_images

FILE = """
import torch, dhf

def build(width: int = 4) -> dhf.Problem:
    module = torch.nn.Linear(2, width)
    return dhf.Problem(dhf.Objective(module, torch.nn.MSELoss()), (torch.ones(3, 2), torch.ones(3, width)))

def wrong():
    return 7

def needs(size):
    return build(size)

def double(dtype=None):
    problem = build()
    return dhf.Problem(dhf.Objective(problem.objective.module.double(), torch.nn.MSELoss()), problem.train, dtype=dtype)
"""

SMALL = {
    "logistic": {"samples": 200, "features": 10},
    "curves-autoencoder": {"samples": 60},
    "adding-rnn": {"hidden": 9},
}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "my_problem.py"
    file.write_text(FILE)
    return str(file)


def test_a_users_file_is_built_with_its_options(path):
    assert build_problem(f"{path}:build", {"width": 9}).objective.module.out_features == 9
    assert build_problem(f"{path}:build", {}).objective.module.out_features == 4


@pytest.mark.parametrize("name", problem_names())
def test_built_in_problems_have_finite_losses_and_metrics(name, tmp_path):
    options = dict(SMALL.get(name, {}))
    if name == "mnist-autoencoder":
        write_images(tmp_path / "train-images-idx3-ubyte", np.zeros((3, 28, 28)))
        options["folder"] = str(tmp_path)
    problem = build_problem(name, options)
    assert problem.dtype in ("float32", "float64")
    dtype = getattr(torch, problem.dtype)
    problem.objective.module.to(dtype)
    for data in (problem.train, problem.validation):
        if data is not None:
            (batch,) = Shard(data, 0, 1, device=torch.device("cpu"), dtype=dtype, batch_size=50).batches(0)
            with torch.no_grad():
                outputs = problem.objective.outputs(batch)
                problem.objective.check(outputs, batch)
                assert problem.objective.loss(outputs, batch).isfinite()
    metrics = problem.metrics(problem.objective.module)
    assert metrics
    assert not set(metrics) & {field.name for field in dataclasses.fields(StepReport)}  # a run reports these itself
    assert all(type(value) is float and 0 <= value < math.inf for value in metrics.values())


@pytest.mark.parametrize("name", [name for name in problem_names() if name != "mnist-autoencoder"])
def test_built_in_data_do_not_follow_the_global_generator(name):
    def facts(seed: int) -> list[dict[str, str]]:
        torch.manual_seed(seed)
        problem = build_problem(name, SMALL.get(name, {}))
        shards = [data for data in (problem.train, problem.validation) if data is not None]
        return [Shard(data, 0, 1, device=torch.device("cpu"), dtype=torch.float64).facts() for data in shards]

    assert facts(0) == facts(1)


def test_errors_name_what_is_known(path):
    for name, options, text in [
        ("digits-autoencodr", {}, "did you mean 'digits-autoencoder'"),
        ("nonsense", {}, "choose from digits-autoencoder, digits-classifier, "),
        ("absent.py:build", {}, "problem file 'absent.py' does not exist"),
        (f"{path}:biuld", {}, "has no function 'biuld'; it has build, wrong, needs, double"),
        (f"{path}:wrong", {}, "returned int, not a dhf.Problem"),
        (f"{path}:build", {"widht": 3}, "has no option 'widht'; did you mean 'width'"),
        (f"{path}:build", {"width": "wide"}, "width must be a whole number, got 'wide'; set it by --options.width"),
        (f"{path}:needs", {}, "needs --options.size VALUE"),
        (f"{path}:double", {"dtype": "float16"}, "dtype must be float32 or float64, got 'float16'"),
        ("mnist-autoencoder", {}, "needs --options.folder VALUE"),
        ("digits-autoencoder", {"connections": 0}, "connections must be a whole number and at least 1"),
    ]:
        with pytest.raises(dhf.UsageError) as error:
            build_problem(name, options)
        assert text in str(error.value)


def test_the_dtype_is_that_of_the_parameters_unless_it_is_given(path):
    assert build_problem(f"{path}:build", {}).dtype == "float32"
    assert build_problem(f"{path}:double", {}).dtype == "float64"
    assert build_problem(f"{path}:double", {"dtype": "float32"}).dtype == "float32"
    assert build_problem(f"{path}:double", {"dtype": torch.float64}).dtype == "float64"


def test_a_problem_of_a_module_without_its_loss_is_refused():
    with pytest.raises(dhf.UsageError, match=r"needs a dhf.Objective, got Linear; use dhf.Objective\(module, loss\)"):
        dhf.Problem(torch.nn.Linear(2, 1), (torch.ones(3, 2), torch.ones(3, 1)))
