"""Work that is recorded: done as often as it is asked for, whether it can be recorded or not."""

from __future__ import annotations

import pytest
import torch

from dhf.replay import Replay, SteadyMap, aside

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]


@pytest.mark.parametrize("device", DEVICES)
def test_work_is_done_as_often_as_it_is_asked_for(device: str) -> None:
    x = torch.zeros(3, device=device)
    replay = Replay(x.device)
    for times in range(1, 6):
        replay(lambda: x.add_(1))
        assert x.tolist() == [times] * 3
    assert replay.refused == (None if device == "cuda" else "it is not on a GPU")


@pytest.mark.parametrize("device", DEVICES)
def test_a_recording_that_fails_leaves_nothing_behind(device: str) -> None:
    x, seen = torch.zeros(3, device=device), []
    good, bad = Replay(x.device), Replay(x.device)

    def waits() -> None:
        x.add_(1)
        seen.append(float(x[0]))

    for _ in range(3):
        good(lambda: x.add_(1))
    for _ in range(3):
        bad(waits)
    assert bad.refused is not None
    assert seen == [4, 5, 6]
    good(lambda: x.add_(1))
    assert x.tolist() == [7] * 3
    torch.rand(3, device=device)  # neither the generator nor the memory takes a recording to be going on
    if device == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        for _ in range(3):
            again = Replay(x.device, warm=True)
            again(waits)
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == before


def test_a_map_is_noted_whenever_it_is_applied() -> None:
    noted: list[int] = []
    double = SteadyMap(lambda x: 2 * x, lambda: noted.append(1))
    assert double(torch.ones(2)).tolist() == [2, 2]
    assert double.launch(torch.ones(2)).tolist() == [2, 2]
    assert len(noted) == 1  # where only the kernels are asked for, the caller notes it


@pytest.mark.parametrize("device", DEVICES)
def test_work_aside_is_in_order_with_what_is_around_it(device: str) -> None:
    x = torch.zeros(1000, device=device)
    for _ in range(20):
        x.add_(1)
        with aside(x.device), aside(x.device):
            x.mul_(2)
    assert x[0] == 2.0**21 - 2
