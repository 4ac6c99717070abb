"""200 steps leave memory and open files as they were."""

import gc
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import dhf

MIB = 2**20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to read resident memory")
def test_200_steps_leave_memory_and_open_files_flat():
    x = torch.randn(500, 50)
    module = nn.Sequential(nn.Linear(50, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 5))
    objective = dhf.Objective(module, nn.MSELoss())
    optimizer = dhf.HessianFree(objective, cg_max_iterations=4)
    batches = [(x[:250], x[:250, :5]), (x[250:], x[250:, :5])]
    for _ in range(20):
        optimizer.step(batches)
    gc.collect()
    before, files = resident_bytes(), len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        report = optimizer.step(batches)
    gc.collect()
    # one leaked graph is 4 MiB or so; 200 of them would be 800
    assert resident_bytes() - before < 30 * MIB
    assert len(os.listdir("/proc/self/fd")) == files
    assert report.products > 0
