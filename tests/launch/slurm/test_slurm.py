"""The batch scripts on a real SLURM: parity with one process, exit codes, and what is requeued: that once, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from dhf.train import main
from tests.faults.forked import run
from tests.launch.slurm.cluster import BOUND, ROOT, Cluster, Job, cluster

__all__ = ["cluster"]

pytestmark = pytest.mark.launch

PACED = ("--problem", f"{Path(__file__).with_name('paced.py')}:build", "--dtype", "float64")
SIX = ("--steps", "6", "--checkpoint-every", "0", "--target-loss", "-1")
PROBLEMS = {
    "pinn": ("--problem", "poisson-pinn", "--dtype", "float64", "--steps", "3"),
    "default": ("--dtype", "float64", "--steps", "2", "--micro-batch-size", "400"),
}
# script, its switches, and a problem
PARITY = {
    "torchrun": ("torchrun", {}, "pinn"),
    "torchrun-static": ("torchrun", {"DHF_RENDEZVOUS": "static"}, "default"),
    "srun": ("srun", {}, "pinn"),
    "srun-default": ("srun", {}, "default"),
    "mpi": ("mpi", {}, "pinn"),
    "mpi-mpirun": ("mpi", {"DHF_MPI": "mpirun"}, "default"),
}
SCRIPTS = ("torchrun", "srun", "mpi")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of one process."""
    folder, losses = tmp_path_factory.mktemp("alone"), {}
    for name, flags in PROBLEMS.items():
        assert main([*flags, "--run-dir", str(folder / name)]) == 0
        rows = (folder / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(row)["loss_after"] for row in rows]
    return losses


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the paced problem on two ranks that nothing stops."""
    ended = run(2, tmp_path_factory.mktemp("whole"), *PACED, *SIX, within=BOUND)
    return [row["loss_after"] for row in ended.rows()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, folder: Path, alone: dict[str, list[float]], whole: list[float]) -> dict[str, Job]:
    """All that need not be alone, submitted at once (the truths, which are quick, have come first)."""
    pace, go = (*PACED, *SIX), ("--options.go", str(folder / "go-after-the-signal"))
    signal, clock = ("--time=20", "--signal=B:USR2@110"), ("--time=2", "--signal=B:USR2@100", "--nodes=1")
    jobs = {
        f"{script}-signal": cluster.submit(script, *pace, *go, folder=folder, ranks=1, options=signal)
        for script in ("torchrun", "srun")
    }
    flags = (*pace, "--options.go", str(folder / "go-at-the-end"))
    jobs["mpirun-clock"] = cluster.submit("mpi", *flags, folder=folder, options=clock, DHF_MPI="mpirun")
    jobs["scancel"] = cluster.submit("srun", *pace, *go, folder=folder, ranks=1)
    for name, (script, switches, problem) in PARITY.items():
        jobs[name] = cluster.submit(script, *PROBLEMS[problem], folder=folder, **switches)
    for script in ("torchrun", "mpi"):
        # rank 1 is on the second node
        jobs[f"{script}-fails"] = cluster.submit(script, *pace, "--options.fault", "1", folder=folder, ranks=1)
    jobs["mpi-none"] = cluster.submit("mpi", *pace, folder=folder, ranks=1, DHF_MPI="none")
    hopeless = ("--time=1", "--signal=B:USR2@1")  # the ranks stop 60 seconds before the end
    jobs["no-progress"] = cluster.submit("srun", *pace, folder=folder, ranks=1, options=hopeless)
    jobs["usage"] = cluster.submit("torchrun", "--stepz", "3", folder=folder)
    flags, array = (*PROBLEMS["pinn"], "--steps", "1", "--seed", "%a"), ("--array=3-4", "--nodes=1")
    jobs["array-3"] = cluster.submit("srun", *flags, folder=folder, ranks=1, options=array, task="3")
    number = jobs["array-3"].number.replace("_3", "_4")
    jobs["array-4"] = Job(cluster, number, folder / f"slurm-{number}.out", folder / "runs" / f"slurm-{number}")
    return jobs


@pytest.fixture(scope="module")
def stopped(cluster: Cluster, folder: Path, jobs: dict[str, Job]) -> dict[str, Job]:
    """Those whose end of time comes, or a signal of the user, while they wait after step 3."""
    signalled = [job for name, job in jobs.items() if name.endswith("-signal")]
    for job in signalled:
        job.wait_for_step(2)
        cluster.call("scontrol", "update", f"JobId={job.number}", "TimeLimit=2")
    jobs["scancel"].wait_for_step(2)
    cluster.call("scancel", "--signal=USR2", jobs["scancel"].number)
    late = jobs["mpirun-clock"]
    for job in signalled:
        warned(job)
    (folder / "go-after-the-signal").touch()  # within 30 seconds, after which torchrun kills its ranks
    warned(late)
    late.until(lambda: late.seconds_left() < 19 * 60, "near its first end")
    (folder / "go-at-the-end").touch()
    return jobs


def warned(job: Job) -> None:
    """Wait for SIGUSR2, and let the job have time enough when it starts again."""
    job.wait_for("SIGUSR2")
    job.cluster.call("scontrol", "update", f"JobId={job.number}", "TimeLimit=20")


@pytest.fixture(scope="module")
def pre_empted(cluster: Cluster, folder: Path, jobs: dict[str, Job]) -> dict[str, Job]:
    """Jobs that an urgent one pre-empts while they wait after step 3: SLURM requeues one; the other has time to end by itself."""
    for job in jobs.values():  # they would be, too
        job.wait()
    go = folder / "go-on-after-pre-emption"
    flags = (*PACED, *SIX, "--options.go", str(go))
    early = {
        partition: cluster.submit("srun", *flags, folder=folder, ranks=1, options=(f"--partition={partition}",))
        for partition in ("main", "graceful")
    }
    for job in early.values():
        job.wait_for_step(2)
    cluster.call("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "sleep 1", cwd=folder)
    early["graceful"].until(lambda: early["graceful"].field("PreemptTime") not in ("", "None"), "pre-empted")
    early["main"].wait_for("DUE TO PREEMPTION")
    go.touch()
    return early


def check_went_on(job: Job, whole: list[float]) -> None:
    """It was restarted once, where it had stopped."""
    assert job.wait() == 0, job.said()
    assert job.field("Restarts") == "1"
    assert "resumed at step 3 from" in job.said()
    assert job.losses() == pytest.approx(whole, rel=1e-12)
    assert (job.result()["reason"], job.result()["steps"]) == ("STEPS_DONE", 6)
    assert job.said().count("slurm: job") == 2


@pytest.mark.parametrize("name", ["torchrun-signal", "srun-signal", "mpirun-clock"])
def test_the_end_of_time_requeues_a_job_once(name, stopped, whole):
    job = stopped[name]
    check_went_on(job, whole)
    assert job.said().count("slurm: requeueing: its time is nearly over; it goes on at step-3") == 1, job.said()


def test_a_job_that_does_no_step_is_not_requeued(jobs):
    job = jobs["no-progress"]
    assert job.wait() == 75, job.said()
    assert (job.result()["reason"], job.field("Restarts")) == ("TIME_LIMIT", "0")
    assert "not requeued: no step was done since the start" in job.said()


def test_a_stop_signal_alone_requeues_nothing(stopped):
    """scancel --signal=USR2 is the user's wish to stop after a checkpoint."""
    job = stopped["scancel"]
    assert job.wait() == 75, job.said()
    assert (job.result()["reason"], job.field("Restarts")) == ("INTERRUPTED", "0")
    assert "not requeued: it was stopped by a signal" in job.said()


@pytest.mark.parametrize("name", PARITY)
def test_four_ranks_on_two_nodes_train_as_one_process_does(name, jobs, alone):
    job = jobs[name]
    assert job.wait() == 0, job.said()
    assert job.losses() == pytest.approx(alone[PARITY[name][2]], rel=1e-9)
    result = job.result()
    assert (result["reason"], result["exit_code"], result["world_size"]) == ("STEPS_DONE", 0, 4)
    assert re.search(rf"job {job.number}, attempt 1: 4 ranks on 2 node\(s\) \(n1 n2\)", job.said())
    assert "not requeued" in job.said()
    assert job.field("Restarts") == "0"


def test_the_tasks_of_an_array_have_run_directories_of_their_own(jobs):
    first, second = jobs["array-3"], jobs["array-4"]
    for job, seed in ((first, 3), (second, 4)):
        assert job.wait() == 0, job.said()
        assert f"\nseed: {seed}\n" in (job.directory / "config.yaml").read_text()
    assert first.losses() != second.losses()


@pytest.mark.parametrize("script", ["torchrun", "mpi"])
def test_a_failing_rank_ends_the_job_with_5_and_without_a_requeue(script, jobs):
    job = jobs[f"{script}-fails"]
    assert job.wait() == 5, job.said()
    result = job.result()
    assert (result["reason"], result["exit_code"], result["failed_rank"]) == ("RANK_FAILED", 5, 1)
    assert "a fault of the test" in result["error"]
    assert "slurm: not requeued" in job.said()
    assert job.field("Restarts") == "0"


def test_ranks_that_mpi_does_not_know_are_refused(jobs):
    job = jobs["mpi-none"]
    assert job.wait() == 2, job.said()
    assert (
        "but MPI's world has size 1 in each, so they would run as 2 separate jobs; start with srun --mpi=" in job.said()
    )
    assert not job.directory.exists()


def test_flags_that_do_not_parse_are_refused_once(jobs):
    job = jobs["usage"]
    assert job.wait() == 2, job.said()
    assert job.said().count("error:") == 1, job.said()
    assert "--steps" in job.said()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_that_does_not_find_dhf_says_so(script, tmp_path):
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / f"slurm_{script}.sbatch")],
        env={"PATH": "/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == f"error: dhf is not in {tmp_path}: submit in the project's folder, or set DHF_ROOT to it\n"


@pytest.mark.parametrize("partition", ["main", "graceful"])
def test_pre_emption_requeues_a_job_once(partition, pre_empted, whole):
    job = pre_empted[partition]
    check_went_on(job, whole)
    by_script = job.said().count("slurm: requeueing: pre-empted; it goes on at step-3")
    assert by_script == (partition == "graceful"), job.said()
    assert ("not requeued by this script: SLURM has ended the job" in job.said()) == (partition == "main")
