"""python -m dhf: its help, which imports no torch, and commands that do not exist."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from dhf.__main__ import COMMANDS, main

DISTRIBUTED = ("train", "solve", "spectrum", "influence", "doctor")


def loaded_after(*argv: str) -> tuple[str, list[str]]:
    """What a command line prints, and which heavy packages it has imported."""
    code = (
        "import sys\nfrom dhf.__main__ import main\n"
        f"code = main({list(argv)!r})\n"
        "heavy = [m for m in ('torch', 'numpy', 'matplotlib', 'rich', 'mpi4py') if m in sys.modules]\n"
        "print('code', code, 'heavy', *heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    text, _, last = done.stdout.rstrip().rpartition("\n")
    assert last.startswith("code 0 heavy")
    return text, last.split()[3:]


def test_help_lists_the_commands_and_imports_no_torch():
    text, heavy = loaded_after("--help")
    assert heavy == []
    for name, (_, summary) in COMMANDS.items():
        assert f"  {name} " in text
        assert summary in text


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_of_a_command_has_examples_and_imports_no_torch(name):
    text, heavy = loaded_after(name, "--help")
    assert heavy == []
    example = "python -m dhf.train" if name == "train" else f"python -m dhf {name}"
    assert f"  {example}" in text
    if name in DISTRIBUTED:
        assert "exit codes" in text
        assert "torchrun --nproc_per_node=4" in text
    assert callable(importlib.import_module(COMMANDS[name][0]).main)


def test_the_console_script_is_this_program():
    scripts = Path(__file__).parents[2].joinpath("pyproject.toml").read_text().partition("[project.scripts]\n")[2]
    name, _, target = scripts.splitlines()[0].partition(" = ")
    module, _, function = target.strip('"').partition(":")
    assert name == "dhf"
    assert getattr(importlib.import_module(module), function) is main


def test_no_command_is_a_call_for_help(capsys):
    assert main([]) == 0
    assert "usage: python -m dhf COMMAND" in capsys.readouterr().out


def test_a_reader_that_leaves_early_is_no_failure():
    """As ``| head`` does."""
    started = subprocess.Popen(
        [sys.executable, "-m", "dhf", "doctor", "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    started.stdout.close()
    with started.stderr:
        complaints = started.stderr.read()
    assert (started.wait(60), complaints) == (0, "")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["sovle"], "unknown command 'sovle'; did you mean solve?"),
        (["xyzzy"], "unknown command 'xyzzy'; choose from train, solve, spectrum, influence, doctor"),
        (["solve", "--dampign", "1"], "unknown setting --dampign; did you mean --damping?"),
        (["solve", "--damping", "-1"], "--damping must be finite and not negative, got -1.0"),
        (["solve", "--output", "x.txt"], "--output x.txt must end in .pt or .npy"),
        (["doctor", "--threads", "0"], "--threads must be positive and finite, got 0"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_2(capsys, argv, words):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert words in line
