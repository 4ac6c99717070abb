"""What a run opens to others: nothing beyond the host where all ranks are on one."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest

from dhf.run.config import _parser
from tests.faults.forked import start
from tests.launched import needs_proc

_LISTENING = "0A"


def listening(pid: int) -> dict[str, str]:
    """The sockets that a process listens on, inode to address, from its open files and the kernel's tables."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(link) if link.is_symlink() else ""
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = {}
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        path = Path(f"/proc/{pid}/net/{table}")
        for line in path.read_text().splitlines()[1:] if path.exists() else []:
            fields = line.split()
            if fields[3] == _LISTENING and fields[9] in inodes:
                words = bytes.fromhex(fields[1].partition(":")[0])
                # the kernel prints each 32-bit word in the host's order
                packed = b"".join(struct.pack("=I", w) for w in struct.unpack(f">{len(words) // 4}I", words))
                found[fields[9]] = socket.inet_ntop(family, packed)
    return found


@needs_proc
def test_ranks_on_one_host_listen_on_its_loopback_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with socket.create_server(("127.0.0.1", 0)), socket.create_server(("0.0.0.0", 0)):  # the search finds both
        assert {"127.0.0.1", "0.0.0.0"} <= set(listening(os.getpid()).values())
    trained = start(3, tmp_path, "--steps", "20", "--options.pause", "0.1", "--target-loss", "-1")
    trained.wait_for_step(2)
    inherited = listening(os.getpid())  # among them the test's own store, which stands for torchrun's
    opened = [listening(process.pid) for process in trained.processes if process.pid is not None]
    assert trained.wait() == [0, 0, 0], trained.said()
    for sockets in opened:
        assert {address for inode, address in sockets.items() if inode not in inherited} == {"127.0.0.1"}


def test_the_help_says_that_a_problem_file_is_code() -> None:
    assert "A problem file is Python code, and is run." in _parser().format_help()
