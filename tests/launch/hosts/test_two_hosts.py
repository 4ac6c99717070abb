"""dhf.train on two hosts with a launcher each: the same numbers as on one, and an end to everything when the other is lost."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.two_hosts import HostsUnavailable, TwoHosts, two_hosts
from tests.launched import BOUND, Launched, needs_proc

pytestmark = [pytest.mark.launch, needs_proc]

DIGITS = ("--dtype", "float64", "--steps", "6", "--checkpoint-every", "0")
PINN = ("--problem", "poisson-pinn", "--dtype", "float64", "--steps", "4", "--checkpoint-every", "0")
ENDLESS = ("--dtype", "float64", "--steps", "100000", "--time-budget", str(BOUND), "--checkpoint-every", "0")


@contextlib.contextmanager
def linked(delay_us: int = 0, rate_mbit: int = 0) -> Iterator[TwoHosts]:
    """Two hosts, or a skipped test."""
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(two_hosts(delay_us, rate_mbit))
        except HostsUnavailable as missing:
            pytest.skip(str(missing))
        yield hosts


class Job:
    """A launcher with two ranks on each host, writing to ``folder/run``."""

    def __init__(self, hosts: TwoHosts, folder: Path, *flags: str, rendezvous: str = "c10d") -> None:
        self.directory = folder / "run"
        worker = ("-m", "dhf.train", "--run-dir", str(self.directory), *flags)
        self.agents = [Launched(2, launcher=command) for command in hosts.torchrun(2, *worker, rendezvous=rendezvous)]

    def wait_for_step(self, step: int) -> None:
        """Until so many steps are in the metrics."""
        self.agents[0].wait_for_step(step, self.directory)

    def wait(self, within: float = BOUND) -> tuple[list[int], list[str]]:
        """Each launcher's exit code and what was said on its host; nothing may be left running on either."""
        end = time.monotonic() + within
        try:
            done = [agent.wait(max(0.1, end - time.monotonic())) for agent in self.agents]
            assert [agent.wait_until_gone(within=5) for agent in self.agents] == [[], []]
        finally:
            for agent in self.agents:
                agent.stop()
        return [code for code, _, _ in done], [out + err for _, out, err in done]

    def losses(self) -> list[float]:
        """After each step."""
        return losses(self.directory)

    def result(self) -> dict[str, Any]:
        """result.json."""
        return json.loads((self.directory / "result.json").read_text())


def losses(directory: Path) -> list[float]:
    return [json.loads(row)["loss_after"] for row in (directory / "metrics.jsonl").read_text().splitlines()]


def alone(folder: Path, *flags: str) -> list[float]:
    """The losses of one process."""
    command = [sys.executable, "-m", "dhf.train", "--run-dir", str(folder), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BOUND, check=False)
    assert done.returncode == 0, done.stderr
    return losses(folder)


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The digits over a fast link."""
    with linked() as hosts:
        job = Job(hosts, tmp_path_factory.mktemp("fast"), *DIGITS)
        codes, said = job.wait()
    assert codes == [0, 0], said
    return job


def check_result(job: Job, steps: int) -> None:
    result = job.result()
    assert (result["world_size"], result["reason"], result["exit_code"]) == (4, "STEPS_DONE", 0)
    assert len(job.losses()) == result["steps"] == steps


# No test sets GLOO_SOCKET_IFNAME, though each host's own name resolves to 127.0.1.1 there: dhf finds the interface.


def test_the_digits_on_two_hosts_train_as_one_process_does(tmp_path: Path, fast: Job) -> None:
    check_result(fast, 6)
    assert fast.losses() == pytest.approx(alone(tmp_path, *DIGITS), rel=1e-9)


def test_a_pinn_by_a_static_rendezvous_trains_as_one_process_does(tmp_path: Path) -> None:
    with linked() as hosts:
        job = Job(hosts, tmp_path, *PINN, rendezvous="static")
        codes, said = job.wait()
    assert codes == [0, 0], said
    check_result(job, 4)
    assert job.losses() == pytest.approx(alone(tmp_path / "one", *PINN), rel=1e-9)


@pytest.mark.long
@pytest.mark.parametrize(("delay_us", "rate_mbit"), [(1000, 0), (0, 100)])
def test_a_slow_link_changes_no_bit(tmp_path: Path, fast: Job, delay_us: int, rate_mbit: int) -> None:
    with linked(delay_us, rate_mbit) as hosts:
        job = Job(hosts, tmp_path, *DIGITS)
        codes, said = job.wait()
    assert codes == [0, 0], said
    check_result(job, 6)
    assert job.losses() == fast.losses()


def test_a_link_that_comes_back_in_time_changes_no_bit(tmp_path: Path, fast: Job) -> None:
    with linked(delay_us=1000) as hosts:  # so that no machine is done before the link is cut
        job = Job(hosts, tmp_path, *DIGITS)
        job.wait_for_step(2)
        hosts.cut()
        time.sleep(0.5)
        before = len(job.losses())
        time.sleep(1)
        assert len(job.losses()) == before < 6
        hosts.heal()
        codes, said = job.wait()
    assert codes == [0, 0], said
    check_result(job, 6)
    assert job.losses() == fast.losses()


def test_a_link_that_is_cut_ends_the_ranks_on_both_hosts(tmp_path: Path) -> None:
    with linked() as hosts:
        job = Job(hosts, tmp_path, *ENDLESS, "--timeout", "3", rendezvous="static")
        job.wait_for_step(2)
        hosts.cut()
        codes, said = job.wait(within=60)
    assert codes == [5, 5], said
    assert "error: ranks 2, 3 missing in " in said[0]
    # the store where ranks would be missed is on the other side
    assert "lost the others in " in said[1]
    result = job.result()
    assert (result["exit_code"], result["reason"], result["failed_rank"]) == (5, "COMMUNICATION_FAILED", 2)


@pytest.mark.parametrize(("rendezvous", "dies"), [("static", 1), pytest.param("c10d", 0, marks=pytest.mark.long)])
def test_a_host_that_dies_ends_the_other(tmp_path: Path, rendezvous: str, dies: int) -> None:
    with linked() as hosts:
        job = Job(hosts, tmp_path, *ENDLESS, rendezvous=rendezvous)
        job.wait_for_step(2)
        hosts.kill(dies)
        codes, said = job.wait(within=60)
    assert (codes[dies], codes[1 - dies]) == (-9, 5), said
    if dies == 1:
        assert "error: ranks 2, 3 missing in " in said[0]
        result = job.result()
        assert (result["exit_code"], result["reason"], result["failed_rank"]) == (5, "COMMUNICATION_FAILED", 2)
    else:  # with it died the store
        assert (
            "error: this launcher lost the host where the launchers meet" in said[1] or "lost the others in " in said[1]
        )
        assert "Traceback" not in said[1]
