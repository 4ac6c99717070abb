"""Two hosts on one machine, as network namespaces with a link between them, and torchrun's agents on both; see two_hosts.sh.

with two_hosts(delay_us=1000, rate_mbit=1000) as hosts:
    agents = [subprocess.Popen(command) for command in hosts.torchrun(2, "-m", "dhf.train", "--steps", "3")]
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

__all__ = ["ADDRESSES", "HostsUnavailable", "TwoHosts", "two_hosts"]

ADDRESSES = ("10.77.0.1", "10.77.0.2")
_SCRIPT = Path(__file__).with_name("two_hosts.sh")
_WRAPPER = Path(__file__).parents[1] / "launch" / "torchrun.py"
_UNAVAILABLE = 69
_PORT = 29500


class HostsUnavailable(RuntimeError):
    """This machine or user cannot make network namespaces; the text says what is missing."""


@dataclasses.dataclass(frozen=True)
class TwoHosts:
    """The hosts' names, each of which resolves on both; ADDRESSES are their addresses on the link."""

    names: tuple[str, str]

    def on(self, host: int, *command: str) -> list[str]:
        """The command line that runs a command on host 0 or 1."""
        return [str(_SCRIPT), "on", self.names[host], *command]

    def torchrun(
        self, ranks: int, *worker: str, rendezvous: str = "c10d", address: str | None = None
    ) -> list[list[str]]:
        """The command lines of both hosts' agents, dhf's own, with so many ranks on each host.

        Args:
            ranks: On each host.
            worker: What follows torchrun's own options: ``"-m", "dhf.train"`` and flags.
            rendezvous: ``"c10d"``, or ``"static"`` for --node-rank, --master-addr and --master-port.
            address: Of the first host, its name by default.
        """
        address = address or self.names[0]
        commands = []
        for host in (0, 1):
            where = (
                ("--rdzv-backend=c10d", f"--rdzv-endpoint={address}:{_PORT}", "--rdzv-id=dhf")
                if rendezvous == "c10d"
                else (f"--node-rank={host}", f"--master-addr={address}", f"--master-port={_PORT}")
            )
            options = (*where, "--nnodes=2", f"--nproc-per-node={ranks}")
            commands.append(self.on(host, sys.executable, str(_WRAPPER), *options, *worker))
        return commands

    def cut(self) -> None:
        """Unplug the cable."""
        _call("cut", *self.names)

    def heal(self) -> None:
        """Plug it in again."""
        _call("heal", *self.names)

    def kill(self, host: int) -> None:
        """End everything that runs on a host, as a crash of all its processes would."""
        _call("kill", self.names[host])

    def measure(self) -> dict[str, float]:
        """The link's ``round_trip_ms`` (median) and ``mbit_per_s``, by TCP."""
        return json.loads(_call("measure", *self.names))


@contextlib.contextmanager
def two_hosts(delay_us: int = 0, rate_mbit: int = 0) -> Iterator[TwoHosts]:
    """Two hosts, removed with all that runs on them afterwards.

    Args:
        delay_us: One-way delay of the link in microseconds.
        rate_mbit: Rate of the link in Mbit/s per direction; 0 is as fast as the machine.

    Raises:
        HostsUnavailable: If this machine or user cannot.
    """
    mark = uuid.uuid4().hex[:8]
    names = (f"dhf-{mark}-a", f"dhf-{mark}-b")
    _call("up", *names, str(delay_us), str(rate_mbit))
    try:
        yield TwoHosts(names)
    finally:
        _call("down", *names)


def _call(*words: str) -> str:
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [str(_SCRIPT), *words], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    if done.returncode == _UNAVAILABLE:
        raise HostsUnavailable(done.stderr.strip().splitlines()[-1].removeprefix("two_hosts.sh: "))
    if done.returncode:
        raise RuntimeError(f"two_hosts.sh {words[0]} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


# the two ends of `two_hosts.sh measure`

_PINGS, _SECONDS = 50, 0.5


def _serve() -> None:
    """Send back what is pinged, then count what comes until the end, and say how much it was."""
    with socket.create_server((ADDRESSES[1], _PORT)) as server:
        server.settimeout(20)
        peer, _ = server.accept()
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for _ in range(_PINGS):
        peer.sendall(peer.recv(1))
    total, began = 0, time.perf_counter()
    while block := peer.recv(1 << 20):
        total += len(block)
    peer.sendall(f"{total * 8e-6 / (time.perf_counter() - began):.4g}".encode())


def _measure() -> None:
    for _ in range(100):
        try:
            peer = socket.create_connection((ADDRESSES[1], _PORT), 5)
            break
        except OSError:
            time.sleep(0.05)
    else:
        sys.exit("the other host does not answer")
    peer.settimeout(20)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    trips = []
    for _ in range(_PINGS):
        began = time.perf_counter()
        peer.sendall(b"x")
        peer.recv(1)
        trips.append(time.perf_counter() - began)
    end, block = time.perf_counter() + _SECONDS, bytes(1 << 16)
    while time.perf_counter() < end:
        peer.sendall(block)
    peer.shutdown(socket.SHUT_WR)
    rate = float(peer.recv(64))
    print(json.dumps({"round_trip_ms": round(statistics.median(trips) * 1e3, 4), "mbit_per_s": rate}))


if __name__ == "__main__":
    {"serve": _serve, "measure": _measure}[sys.argv[1]]()
