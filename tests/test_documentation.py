"""README and docs do what they say: blocks of Python and YAML run, commands run or are checked, every outcome has its entry."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.run import get_args_parser
from torch.utils.data import TensorDataset

import dhf
from dhf.__main__ import main as command
from dhf.errors import __all__ as ERRORS
from dhf.run.config import parse
from dhf.train import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
NAMES = [page.name for page in PAGES]
LANGUAGES = ("python", "bash", "yaml", "text")  # text is what a program prints, and is not run

# what blocks may import that the tests do not ask for
OPTIONAL = ("lightning", "accelerate")


def classification() -> dict[str, Any]:
    """What the README's blocks start from: a module and this rank's micro-batches."""
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    x, y = torch.randn(40, 4), torch.randint(0, 3, (40,))
    return {"module": module, "batches": [(x[:30], y[:30]), (x[30:], y[30:])]}


def own_loop() -> dict[str, Any]:
    """What the last block of the page on loops is called with, where Accelerate's, which makes it, is not installed."""
    module = torch.nn.Linear(4, 3)
    optimizer = dhf.HessianFree(dhf.Objective(module, torch.nn.CrossEntropyLoss()))
    return {
        "dhf": dhf,
        "optimizer": optimizer,
        "dataset": TensorDataset(torch.randn(20, 4), torch.randint(0, 3, (20,))),
    }


BEFORE: dict[str, Callable[[], dict[str, Any]]] = {"README.md": classification, "loops.md": own_loop}


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: the line of its fence, from 1, its language, and what it holds."""

    line: int
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that its first line says it is."""
        found = re.match(r"# (\w+\.(?:py|yaml))$", self.text.partition("\n")[0])
        return found[1] if found else None


def blocks(page: Path, *languages: str) -> list[Block]:
    found, opened = [], None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            if opened is None:
                opened = (number, line[3:].strip(), [])
            else:
                found.append(Block(opened[0], opened[1], "\n".join(opened[2]) + "\n"))
                opened = None
        elif opened is not None:
            opened[2].append(line)
    assert opened is None, f"{page}: the block at line {opened[0]} has no end"
    return [block for block in found if not languages or block.language in languages]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to run a page's blocks in, with the files that the page tells to write, the examples and the licence."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("examples", "LICENSE", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    for page in PAGES:
        for block in blocks(page, "python", "yaml"):
            if block.file:
                (tmp_path / block.file).write_text(block.text)
    yield tmp_path
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_block_is_of_a_kind_that_is_tested(page):
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{page.name}:{block.line}: ```{block.language}"
    lines, fenced = page.read_text(encoding="utf-8").splitlines(), False
    for before, line in zip(["", *lines], lines, strict=False):
        fenced ^= line.startswith("```")
        # an indented block would be run by nobody
        assert fenced or not (line.startswith("    ") and not before.strip()), f"{page.name}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_runs(page, place, capsys):
    wanted = blocks(page, "python")
    namespace: dict[str, Any] = {"torch": torch, "dhf": dhf, "__name__": page.stem, **BEFORE.get(page.name, dict)()}
    absent = set()
    for block in wanted:
        tree = ast.parse(block.text)
        missing = {name for name in OPTIONAL if name in _imports(tree) and importlib.util.find_spec(name) is None}
        absent |= missing
        if missing:
            continue
        ast.increment_lineno(tree, block.line)
        exec(compile(tree, str(page), "exec"), namespace)
    if absent:
        pytest.skip(f"some blocks were not run: they need {' and '.join(sorted(absent))}")


def _imports(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_yaml_is_a_configuration(page, place):
    for block in blocks(page, "yaml"):
        (place / "block.yaml").write_text(block.text)
        assert parse(["--config", "block.yaml"]).problem


# Commands


def commands(page: Path) -> list[tuple[int, list[str]]]:
    """The commands of a page's shell blocks, as words, each with its line."""
    found = []
    for block in blocks(page, "bash"):
        text = block.text.replace("\\\n", "  ")
        found += [(block.line, words) for line in text.splitlines() if (words := shlex.split(line, comments=True))]
    return found


def trainer_flags(words: list[str]) -> list[str] | None:
    """The flags for dhf.train in a command that starts it; None for other commands. Checks the launcher's own part."""
    if "dhf.train" in words:
        cut = words.index("dhf.train")
        launcher, flags = words[: cut - 1], words[cut + 1 :]
        if launcher[0] == "torchrun":
            get_args_parser().parse_args([*launcher[1:], "a script"])
        elif launcher[0] == "mpirun":
            assert launcher[1] == "-n"
            assert int(launcher[2]) > 0
            assert launcher[3:] == ["python"]
        else:
            assert launcher == ["python"]
        return flags
    scripts = [i for i, word in enumerate(words) if word.startswith("launch/") and word != "launch/test.sh"]
    if words[0] in ("bash", "sbatch") and scripts:
        (at,) = scripts
        assert (ROOT / words[at]).is_file()
        if words[0] == "bash":
            assert at == 1
            return words[3:] if len(words) > 2 and words[2].isdigit() else words[2:]
        assert words[at].endswith(".sbatch")
        for option in words[1:at]:
            assert re.fullmatch(r"--(nodes|time|array|partition)=\S+", option), option
        return [word.replace("%a", "0") for word in words[at + 1 :]]
    return None


# commands that the tests do not run: how they start, why, and what is checked instead
def _extras_exist(words: list[str]) -> None:
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = re.findall(r"^(\w+) = ", section, re.MULTILINE)
    for word in words:
        for name in re.findall(r"\[([\w,]+)\]", word):
            assert set(name.split(",")) <= set(extras), name


def _files_exist(words: list[str]) -> None:
    named = [word for word in words if "/" in word and not word.startswith("-")]
    assert named
    assert all((ROOT / name).exists() for name in named), named


def _flags_are_in_the_file(words: list[str]) -> None:
    _files_exist(words)
    source = (ROOT / words[1]).read_text()
    assert all(word in source for word in words[2:] if word.startswith("--") and word != "--help")


def _is_slurms(words: list[str]) -> None:
    assert re.fullmatch(r"scancel --signal=USR2 \d+", " ".join(words))


def _builds_the_docs(words: list[str]) -> None:
    assert (ROOT / "mkdocs.yml").is_file()
    assert "mkdocs build --strict" in (ROOT / ".ci/run").read_text()


NOT_RUN: list[tuple[str, str, Callable[[list[str]], None]]] = [
    ("pip install -e", "needs a package index, and would change the environment of the tests", _extras_exist),
    ("bash launch/test.sh", "runs these tests", _files_exist),
    ("bash .ci/run", "runs these tests", _files_exist),
    ("python benchmarks/", "takes minutes", _flags_are_in_the_file),
    ("scancel", "needs SLURM", _is_slurms),
    ("mkdocs build", "is run by .ci/run, in which mkdocs is installed", _builds_the_docs),
]


# pages whose commands run as they stand, and those whose runs take one step; runs of other pages say what they would do
# (--dry-run), and build and measure all the same
AS_THEY_STAND = ("commands.md",)
ONE_STEP = ("README.md", "your-problem.md")


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_start(page, place, capsys):
    started = []  # the same program by another launcher is not started twice
    for line, words in commands(page):
        where = f"{page.name}:{line}: {' '.join(words)}"
        flags = trainer_flags(words)
        if flags in started:
            continue
        if flags is not None:
            started.append(flags)
            shorter = ["--steps", "1"] if page.name in ONE_STEP else ["--dry-run"]
            _train(flags, where, [] if page.name in AS_THEY_STAND else shorter)
            continue
        if "dhf" in words:  # python -m dhf COMMAND, by any launcher, or the console script
            _command(words[words.index("dhf") + 1 :], where)
            continue
        checks = [check for start, _, check in NOT_RUN if " ".join(words).startswith(start)]
        assert checks, f"{where}: nobody knows how to test this"
        checks[0](words)


def _command(words: list[str], where: str) -> None:
    """Run a command in this process, in the folder in which those before it have run."""
    assert words, where
    code = command(words)
    assert code in (0, 1), f"{where}: exit code {code}"  # the doctor's advice is 1


def _train(flags: list[str], where: str, shorter: list[str]) -> None:
    """Start the trainer in this process: the same program that every launcher starts."""
    if any(flag in ("--help", "--print-config") for flag in flags):
        with pytest.raises(SystemExit) as ended:
            parse(flags)
        assert ended.value.code in (0, None), where
        return
    code = main([*flags, *shorter])
    assert code == 0, f"{where}: exit code {code}"


# Entries


def table_entries(page: str) -> dict[str, str]:
    """The first cell of each table row that is code, with the rest of the row."""
    found = {}
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        row = re.match(r"\| `([^`]+)` \|(.+)\|$", line)
        if row:
            found[row[1]] = row[2]
    return found


def test_every_reason_has_its_entry():
    entries = table_entries("troubleshooting.md")
    for reason in dhf.Reason:
        assert len(entries.get(reason.name, "").strip(" |")) > 20, f"troubleshooting.md has no entry for {reason.name}"
    known = {reason.name for reason in dhf.Reason}
    assert {name for name in entries if name.isupper()} <= known


def test_every_error_has_its_entry():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    for name in ERRORS:
        entry = re.search(rf"^### {name}\n\n(.+?)\n\n", text, re.MULTILINE | re.DOTALL)
        assert entry is not None, f"troubleshooting.md has no entry for {name}"
        assert len(entry[1]) > 80


def test_the_messages_are_those_of_the_code():
    said = "\n".join(text for file in (ROOT / "dhf").rglob("*.py") for text in _texts(ast.parse(file.read_text())))
    messages = [text for text in table_entries("troubleshooting.md") if not text.isupper() and " " in text]
    messages = [text for text in messages if not text.startswith(("--", "torchrun "))]
    assert len(messages) > 30
    for text in messages:
        assert text in said, f"dhf says nowhere: {text}"


def _texts(tree: ast.Module) -> list[str]:
    """The texts of a file, of formatted ones what is constant."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_the_public_names_are_in_the_reference():
    documented = set(re.findall(r"^::: dhf\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    public = {name for name in dhf.__all__ if not name.startswith("__")}
    assert public - documented == set(), "add them to docs/api.md"
    assert documented - public == set(), "dhf has them no longer"


# Links


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize(
    "page", [*PAGES, *sorted((ROOT / "benchmarks" / "results").glob("*.md"))], ids=lambda p: p.name
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{page.name}: {target}"


def test_the_navigation_has_every_page():
    text = (ROOT / "mkdocs.yml").read_text()
    assert {page.name for page in DOCS.glob("*.md")} == set(re.findall(r": ([\w-]+\.md)$", text, re.MULTILINE))
