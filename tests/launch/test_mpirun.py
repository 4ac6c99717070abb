"""dhf.train under a real mpirun: parity with one process, ranks that fail, leave, stop or die, signals, and what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launched import BOUND, LAUNCH, Launched, needs_proc
from tests.mpis import MPIS, starts, tidy  # noqa: F401  (tidy is a fixture)

pytestmark = [pytest.mark.launch, pytest.mark.parametrize("mpi", MPIS), pytest.mark.usefixtures("tidy")]

TRAIN = [sys.executable, "-m", "dhf.train"]
# one start for several runs, whose flags are one argument each
RUNS = "import sys\nfrom dhf.train import main\nsys.exit(max(main(flags.split()) for flags in sys.argv[1:]))"
SHORT = "--dtype float64 --steps 3 --checkpoint-every 0 --run-dir"
DIGITS, PINN = SHORT, f"--problem poisson-pinn {SHORT}"
CONTROL = re.compile(r"[^\n -~\u00a0-\uffff]")

FILE = """
import os, signal, sys, time, torch, dhf

RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK") or 0)

class Faulty(dhf.Objective):
    def __init__(self, fault):
        layers = torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)
        super().__init__(torch.nn.Sequential(*layers), torch.nn.CrossEntropyLoss())
        self.fault, self.step = fault, -1

    def outputs(self, batch):
        if torch.is_grad_enabled():
            self.step += 1
            if self.step == 3 and self.fault == "raise":
                raise RuntimeError("a fault of the test")
            if self.step == 3 and self.fault == "exit":
                sys.exit(3)
            if self.step == 3 and self.fault:
                os.kill(os.getpid(), getattr(signal, self.fault))
        return super().outputs(batch)

def build(fault: str = "", rank: int = 1, pause: float = 0.0) -> dhf.Problem:
    with open(f"pid.{RANK}", "w") as file:
        file.write(str(os.getpid()))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 5, generator=generator)
    y = torch.randint(0, 3, (24,), generator=generator)
    def metrics(module):
        time.sleep(pause)
        return {}
    return dhf.Problem(Faulty(fault if rank == RANK else ""), (x, y), metrics=metrics)
"""
FLAGS = ("--problem", "mine.py:build", "--dtype", "float64", "--run-dir", "run", "--target-loss", "-1")
FAULT = (*FLAGS, "--steps", "9", "--options.fault")
ENDLESS = (*FLAGS, "--steps", "100000", "--checkpoint-every", "0", "--options.pause", "0.1")

SCRIPT = """
import torch, dhf
comm = dhf.connect("mpi", device="cpu", timeout=100)
comm.all_reduce(torch.ones(1))
if comm.rank == 1:
    raise KeyError("a fault of the test")
comm.all_reduce(torch.ones(1))
open(f"went-on.{comm.rank}", "w").close()
"""

LEAVES = """
import sys, torch, dhf
comm = dhf.connect("mpi", device="cpu", timeout=1)
total = torch.ones(1)
comm.all_reduce(total)
if comm.rank == 1:
    sys.exit()
comm.all_reduce(total)
open(f"went-on.{comm.rank}", "w").close()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FILE)
    return tmp_path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process that others are held against."""
    folder = tmp_path_factory.mktemp("alone")
    run([sys.executable, "-c", RUNS, f"{DIGITS} digits", f"{PINN} pinn"], cwd=folder)
    return folder


def run(command: list[str], *, code: int = 0, cwd: Path | None = None) -> tuple[str, str]:
    """What a command that must end with this code has said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=BOUND, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


def losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss_after"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def result() -> dict:
    return json.loads(Path("run/result.json").read_text())


def errors(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("error:")]


def started(mpi: str, ranks: int, *command: str) -> Launched:
    return Launched(ranks, *command, launcher=starts(mpi, ranks))


def check_saved() -> None:
    """The ranks have stopped together, as on a signal."""
    assert (result()["reason"], result()["exit_code"]) == ("INTERRUPTED", 75)
    assert Path("run/checkpoints/LATEST").read_text() == f"step-{result()['steps']}\n"
    assert len(losses(Path("run"))) == result()["steps"]


# parity


def test_four_ranks_train_as_one_process_does(mpi: str, alone: Path) -> None:
    """By MPI's collectives, and by gloo's between ranks that mpirun has started; one after another in the same processes."""
    jobs = [f"{DIGITS} digits", f"{PINN} pinn", f"{PINN} gloo --backend gloo"]
    out, err = run([*starts(mpi, 4), sys.executable, "-c", RUNS, *jobs])
    assert "4 rank(s) over mpi on cpu" in out
    assert "4 rank(s) over gloo on cpu" in out
    assert CONTROL.findall(out + err) == []  # Open MPI gives ranks a terminal of their own
    for job in ("digits", "pinn", "gloo"):
        found = json.loads(Path(job, "result.json").read_text())
        assert [found[name] for name in ("world_size", "reason", "exit_code", "steps")] == [4, "STEPS_DONE", 0, 3]
        assert losses(Path(job)) == pytest.approx(losses(alone / job.replace("gloo", "pinn")), rel=1e-9)
    assert len(losses(Path("pinn"))) == 3


def test_the_launch_script(mpi: str) -> None:
    if Path(sys.prefix) != LAUNCH.parent / ".venv":
        pytest.skip(f"launch/mpirun.sh sets up .venv, and these tests run in {sys.prefix}")
    *command, _, _ = starts(mpi, 2)
    choice = [] if mpi == "mpich" else ["env", f"MPIRUN={' '.join(command)}"]
    script = [*choice, "bash", str(LAUNCH / "mpirun.sh"), "2", "--run-dir", "run"]
    flags = ["--problem", "mine.py:build", "--steps", "1", "--seed", "7"]
    shown, _ = run([*script, *flags, "--print-config"])
    assert "seed: 7" in shown
    assert not Path("run").exists()
    out, _ = run([*script, *flags])
    assert f"mpirun: 2 ranks by {' '.join(command)} (" in out
    assert {"mpich": "Version: ", "openmpi": "Open MPI"}[mpi] in out.splitlines()[0]
    assert "mine.py:build, 2 rank(s) over mpi" in out
    assert (result()["world_size"], result()["steps"]) == (2, 1)


# ranks that fail, leave, stop or die


def test_an_exception_in_an_objective(mpi: str) -> None:
    launched = started(mpi, 3, *TRAIN, *FAULT, "raise")
    code, _, err = launched.wait()
    assert code == 5, err
    assert len(errors(err)) == 1
    assert errors(err)[0].startswith("error: rank 1 (")
    assert errors(err)[0].endswith(") failed in its micro-batch 0: RuntimeError: a fault of the test")
    assert 'raise RuntimeError("a fault of the test")' in err  # the traceback
    found = result()
    assert [found[name] for name in ("reason", "failed_rank", "exit_code", "steps")] == ["RANK_FAILED", 1, 5, 2]
    assert Path("run/checkpoints/LATEST").read_text() == "step-2\n"


@needs_proc
def test_an_uncaught_exception_in_a_users_script(mpi: str) -> None:
    """The others wait for that rank in a collective, and MPI alone would let them wait for ever."""
    Path("script.py").write_text(SCRIPT)
    launched = started(mpi, 4, sys.executable, "script.py")
    code, _, err = launched.wait(within=30)
    assert code == 1, err
    assert 'raise KeyError("a fault of the test")' in err
    assert errors(err) == ["error: rank 1 of 4 ends the job: KeyError: 'a fault of the test'"]
    assert launched.wait_until_gone(within=5) == []
    assert not list(Path().glob("went-on.*"))


@pytest.mark.long
def test_a_rank_of_a_users_script_that_leaves_without_closing(mpi: str) -> None:
    """Nothing that it does as it ends may pass for its part in the others' sum."""
    Path("script.py").write_text(LEAVES)
    code, _, err = started(mpi, 2, sys.executable, "script.py").wait(within=30)
    assert code in (1, 5), err  # by the rank that waited, or by the one that left
    assert errors(err)
    assert all("rank 1" in line for line in errors(err))
    assert not list(Path().glob("went-on.*"))


@needs_proc
def test_a_rank_that_exits(mpi: str) -> None:
    launched = started(mpi, 3, *TRAIN, *FAULT, "exit")
    code, _, err = launched.wait(within=60)
    assert code == 3, err
    assert errors(err) == ["error: rank 1 left the run: SystemExit: 3"]
    assert launched.wait_until_gone(within=5) == []
    assert len(losses(Path("run"))) == 2


@needs_proc
def test_a_stopped_rank_is_named_after_the_timeout(mpi: str) -> None:
    launched = started(mpi, 3, *TRAIN, *FAULT, "SIGSTOP", "--timeout", "3")
    code, _, err = launched.wait(within=60)
    assert code == 5, err
    words = "rank 1 missing in all-reduce: stopped, or busy for longer than the timeout of 3 s"
    assert errors(err) == [f"error: {words}"]
    found = result()
    assert [found[name] for name in ("reason", "failed_rank", "exit_code")] == ["COMMUNICATION_FAILED", 1, 5]
    assert found["error"] == words
    assert Path("run/checkpoints/LATEST").read_text() == "step-2\n"
    assert launched.wait_until_gone(within=10) == []


@needs_proc
@pytest.mark.long
def test_a_killed_rank_ends_the_job(mpi: str) -> None:
    """The launcher ends the others, which can write nothing more."""
    launched = started(mpi, 3, *TRAIN, *FAULT, "SIGKILL", "--checkpoint-every", "1")
    code, out, err = launched.wait(within=60)
    assert code not in (0, 75), out + err
    assert launched.wait_until_gone(within=10) == []
    assert Path("run/checkpoints/LATEST").read_text() == "step-2\n"


# signals


@needs_proc
@pytest.mark.long
def test_a_signal_to_one_rank_stops_all(mpi: str) -> None:
    launched = started(mpi, 2, *TRAIN, *ENDLESS)
    launched.wait_for_step(2)
    os.kill(int(Path("pid.1").read_text()), signal.SIGUSR2)
    code, out, err = launched.wait(within=60)
    assert code == 75, out + err
    check_saved()
    assert launched.wait_until_gone(within=10) == []


@needs_proc
def test_a_signal_that_the_launcher_passes_on(mpi: str) -> None:
    launched = started(mpi, 2, *TRAIN, *ENDLESS)
    launched.wait_for_step(2)
    launched.process.send_signal({"mpich": signal.SIGTERM, "openmpi": signal.SIGUSR2}[mpi])
    code, out, err = launched.wait(within=60)
    assert code == 75, out + err
    check_saved()
    assert launched.wait_until_gone(within=10) == []


@needs_proc
@pytest.mark.long
@pytest.mark.parametrize("name", ["of its own", "SIGKILL"])
def test_a_signal_that_the_launcher_does_not_pass_on(mpi: str, name: str) -> None:
    """SIGUSR2 ends mpich's mpiexec; Open MPI's mpirun, on SIGTERM, leaves ranks a second or so. No rank outlives either."""
    launched = started(mpi, 2, *TRAIN, *ENDLESS)
    launched.wait_for_step(2)
    own = {"mpich": signal.SIGUSR2, "openmpi": signal.SIGTERM}[mpi]
    launched.process.send_signal(signal.SIGKILL if name == "SIGKILL" else own)
    code, out, err = launched.wait(within=60)
    assert code not in (0, 75), out + err
    assert launched.wait_until_gone(within=30) == []


# what is refused


def test_mpi_without_ranks(mpi: str) -> None:
    """Without a launcher, or with one that has started one process."""
    pytest.importorskip("mpi4py")
    launcher = starts(mpi, 1) if mpi == "openmpi" else []
    _, err = run([*launcher, *TRAIN, *FLAGS, "--backend", "mpi"], code=2)
    words = "--backend mpi needs ranks: start with mpirun or srun --mpi=pmi2, or use --backend serial"
    assert errors(err) == [f"error: {words}"]
    assert not Path("run").exists()


def test_mpi_with_torchruns_ranks(mpi: str) -> None:
    """Whether a person has started torchrun, or mpirun one for each host."""
    launcher = [
        sys.executable,
        str(LAUNCH / "torchrun.py"),
        "--standalone",
        "--local-addr=127.0.0.1",
        "--nproc-per-node=2",
    ]
    _, err = run([*starts(mpi, 1), *launcher, "-m", "dhf.train", *FLAGS, "--backend", "mpi"], code=2)
    words = "--backend mpi needs ranks that MPI knows, and torchrun started these; use mpirun or srun"
    assert errors(err) == [f"error: {words}"]
    assert "Traceback" not in err
