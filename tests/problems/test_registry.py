"""Finding problems by name and in a user's file."""

import pytest

import dhf
from dhf.problems import build_problem, problem_names

FILE = """
import torch, dhf

def build(width: int = 4) -> dhf.Problem:
    module = torch.nn.Linear(2, width)
    return dhf.Problem(dhf.Objective(module, torch.nn.MSELoss()), (torch.ones(3, 2), torch.ones(3, width)))

def wrong():
    return 7

def needs(size):
    return build(size)
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "my_problem.py"
    file.write_text(FILE)
    return str(file)


def test_a_users_file_is_built_with_its_options(path):
    assert build_problem(f"{path}:build", {"width": 9}).objective.module.out_features == 9
    assert build_problem(f"{path}:build", {}).objective.module.out_features == 4


@pytest.mark.parametrize("name", problem_names())
def test_built_in_problems_have_finite_losses_and_metrics(name):
    problem = build_problem(name, {})
    loss = problem.objective.loss(
        problem.objective.outputs(tuple(t.float() if t.is_floating_point() else t for t in problem.train)),
        tuple(t.float() if t.is_floating_point() else t for t in problem.train),
    )
    assert loss.isfinite()
    assert all(0 <= value < 100 for value in problem.metrics(problem.objective.module).values())


def test_errors_name_what_is_known(path):
    for name, options, text in [
        ("digits-autoencodr", {}, "did you mean 'digits-autoencoder'"),
        ("nonsense", {}, "choose from digits-autoencoder, digits-classifier, or give FILE.py:FUNCTION"),
        ("absent.py:build", {}, "problem file 'absent.py' does not exist"),
        (f"{path}:biuld", {}, "has no function 'biuld'; it has build, wrong, needs"),
        (f"{path}:wrong", {}, "returned int, not a dhf.Problem"),
        (f"{path}:build", {"widht": 3}, "has no option 'widht'; did you mean 'width'"),
        (f"{path}:needs", {}, "needs --options.size VALUE"),
        ("digits-autoencoder", {"connections": 0}, "connections must be at least 1"),
    ]:
        with pytest.raises(dhf.UsageError) as error:
            build_problem(name, options)
        assert text in str(error.value)
