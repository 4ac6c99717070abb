"""Phases: each second counted once; nothing done where nothing is measured; a GPU waited for only where it is."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace

import pytest
import torch

from dhf.phases import PHASES, Phases


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that stands still unless it is told to go on."""
    state = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: state.now)
    return state


def test_each_second_is_counted_once_in_the_innermost_phase(clock: SimpleNamespace) -> None:
    phases = Phases()
    clock.now += 50.0  # before the step
    phases.begin()
    clock.now += 1.0
    with phases("preconditioner"):
        clock.now += 2.0
        with phases("products"):
            clock.now += 4.0
            with phases("waiting"):
                clock.now += 8.0
        clock.now += 16.0
    clock.now += 32.0
    apply = phases.timed("preconditioner", lambda: setattr(clock, "now", clock.now + 64.0))
    apply()
    profile = phases.end()
    assert profile is not None
    expected = dict.fromkeys(PHASES, 0.0)
    expected |= {"vectors": 33.0, "preconditioner": 82.0, "products": 4.0, "waiting": 8.0}
    assert profile.seconds == expected


def test_an_error_ends_its_phase_and_a_step_begins_at_zero(clock: SimpleNamespace) -> None:
    phases = Phases()
    phases.begin()

    def fail() -> None:
        clock.now += 3.0
        raise RuntimeError

    with phases("graphs"), pytest.raises(RuntimeError):
        phases.timed("products", fail)()
    clock.now += 5.0
    phases.reduced(800)
    first = phases.end()
    assert first is not None
    assert (first.seconds["products"], first.seconds["vectors"]) == (3.0, 5.0)
    assert (first.collectives, first.bytes_reduced) == (1, 800)
    phases.begin()
    second = phases.end()
    assert second is not None
    assert sum(second.seconds.values()) == 0.0
    assert (second.collectives, second.bytes_reduced) == (0, 0)


def test_what_is_not_measured_costs_a_call_and_no_look_at_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    phases = Phases(torch.device("cuda"), active=False)
    monkeypatch.setattr(time, "perf_counter", lambda: pytest.fail("the clock was read"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: pytest.fail("the GPU was waited for"))
    function = len
    assert phases.timed("products", function) is function
    assert phases("products") is phases("waiting")
    phases.begin()
    with phases("products"), phases("waiting"):
        pass
    assert phases.end() is None


def test_a_gpu_is_waited_for_wherever_phases_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    stream = SimpleNamespace(synchronize=lambda: told.append("waited"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    reads = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: told.append("read") or next(reads))
    phases = Phases(torch.device("cuda"))
    told.clear()
    phases.begin()
    with phases("products"):
        pass
    phases.end()
    assert told == ["waited", "read"] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_times_are_those_of_finished_work() -> None:
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    torch.matmul(x, x)
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    phases = Phases(device)
    phases.begin()
    with phases("products"):
        start.record()
        for _ in range(50):
            torch.matmul(x, x)
        end.record()
    profile = phases.end()
    assert profile is not None
    assert profile.seconds["products"] >= 1e-3 * start.elapsed_time(end)
