"""Which of this host's network interfaces reaches another host."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
import sys
from pathlib import Path

__all__ = ["interface_of", "is_loopback", "route"]

_SIOCGIFADDR = 0x8915


def route(host: str) -> tuple[str, str] | None:
    """This host's address on the way to another, and the other's; nothing is sent.

    Args:
        host: Name or address. A host's own address leads to itself, and its own name often to a loopback address.

    Returns:
        Two numerical addresses, or None where the name does not resolve or there is no way.
    """
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                return probe.getsockname()[0], probe.getpeername()[0]
    return None


def is_loopback(address: str) -> bool:
    """Whether an address, such as Debian's 127.0.1.1, is of no use to other hosts."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def interface_of(address: str) -> str | None:
    """The interface that has a numerical address, None if it is not found; on Linux alone."""
    if sys.platform != "linux":
        return None
    wanted = ipaddress.ip_address(address.partition("%")[0])
    if wanted.version == 6:
        with contextlib.suppress(OSError):
            for line in Path("/proc/net/if_inet6").read_text().splitlines():
                digits, *_, name = line.split()
                if int(digits, 16) == int(wanted):
                    return name
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if answer[20:24] == wanted.packed:
                    return name
    return None
