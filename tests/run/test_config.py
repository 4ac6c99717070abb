"""Flags, files and what is refused."""

import dataclasses
import subprocess
import sys

import pytest
import yaml

from dhf.errors import UsageError
from dhf.run.config import Config, idle_settings, parse, to_yaml


def test_flags_override_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("steps: 5\ndamping: 3.0\noptions: {width: 7, name: tanh}\n")
    config = parse(["--config", str(file), "--damping", "4", "--options.depth", "2", "--options.rate", "1e-3"])
    assert (config.steps, config.damping, config.seed) == (5, 4.0, 0)
    assert config.options == {"width": 7, "name": "tanh", "depth": 2, "rate": 1e-3}


def test_the_written_configuration_reads_back_as_itself(tmp_path):
    config = parse(["--steps", "3", "--options.width", "5", "--target-loss", "1e-9", "--deterministic"])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert parse(["--config", str(file)]) == config


def test_print_config_is_the_resolved_configuration(capsys):
    with pytest.raises(SystemExit) as end:
        parse(["--steps", "9", "--print-config"])
    assert end.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed.pop("steps") == 9
    assert (printed["phases"], printed["damping"], printed["preset"]) == ([], None, "auto")
    defaults = dataclasses.asdict(Config())
    del defaults["steps"]
    assert printed == defaults


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--stesp", "3"], "unknown setting --stesp; did you mean --steps?"),
        (["--stesp=3"], "unknown setting --stesp; did you mean --steps?"),
        (["--xyzzy"], "unknown setting --xyzzy; --help lists the settings"),
        (["--steps", "many"], "--steps must be an integer, got 'many'"),
        (["--device", "gpu"], "--device 'gpu' is unknown; choose from auto, cpu, cuda"),
        (["--time-budget", "soon"], "--time-budget must be a number, got 'soon'"),
        (["--micro-batch-size", "some"], "--micro-batch-size must be an integer or auto, got 'some'"),
        (["--micro-batch-size", "0"], "--micro-batch-size must be positive"),
        (["--retain", "some"], "--retain some is unknown; give all, none, auto, or a size such as 2GiB or 500MB"),
        (["--batch-size", "1.5"], "--batch-size must be an integer, got '1.5'"),
        (["--config", "absent.yaml"], "File does not exist"),
        (["--damping", "0"], "--damping must be positive"),
        (["--steps", "-1"], "--steps must not be negative"),
        (["--curvature-fraction", "2"], "--curvature-fraction must be in"),
        (["--overwrite", "--resume", "auto"], "give one of them"),
        (["--error-if-not-converged"], "needs a --target-loss"),
        (["--target-loss", ".nan"], "--target-loss must be finite"),
        (["--solver", "lu"], "--solver 'lu' is unknown; choose from auto, cg, cgls, direct, minres, steihaug"),
        (["--cg-forcing", "maybe"], "--cg-forcing must be true or false, got 'maybe'"),
        (["--phases", "adam"], "--phases must be a list, got 'adam'"),
        (["--phases", "[{steps: 3}, {stpes: 3}]"], "phase 2: unknown setting stpes; did you mean steps?"),
    ],
)
def test_bad_settings_are_refused_in_one_line(arguments, text):
    with pytest.raises(UsageError) as error:
        parse(arguments)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_key_in_a_file_is_refused(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("dampin: 3.0\n")
    with pytest.raises(UsageError, match="unknown setting dampin; did you mean damping"):
        parse(["--config", str(file)])


def test_steps_have_a_default_where_no_phases_give_them():
    assert parse([]).steps == 35
    config = parse(["--phases", "[{steps: 3}, {optimizer: adam, steps: 4, learning_rate: 1e-2}]"])
    assert config.steps is None
    assert config.phases == [{"steps": 3}, {"optimizer": "adam", "steps": 4, "learning_rate": 0.01}]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--damping", "2", "--preset", "newton"], []),
        (["--learning-rate", "0.1"], ["not used by hf: --learning-rate"]),
        (["--optimizer", "adam", "--damping", "2", "--cg-rtol", ".1"], ["not used by adam: --damping, --cg-rtol"]),
        (["--learning-rate", "1", "--damping", "2", "--phases", "[{optimizer: adam, steps: 1}, {steps: 1}]"], []),
        (["--phases", "[{steps: 1, learning_rate: 1}]"], ["phase 1: not used by hf: learning_rate"]),
    ],
)
def test_settings_that_no_optimizer_takes_are_told(arguments, words):
    assert idle_settings(parse(arguments)) == words


def test_help_imports_no_torch():
    code = (
        "import sys\nfrom dhf.train import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--time-budget" in done.stdout
    assert "torchrun --nproc_per_node=4 -m dhf.train" in done.stdout
    for text in ("optimizer:\n", "Hessian-free:\n", "--curvature {ggn,hessian,fisher}\n", "--seed N", "(default: 0)"):
        assert text in done.stdout
    assert "Optional" not in done.stdout
    assert "null" not in done.stdout
