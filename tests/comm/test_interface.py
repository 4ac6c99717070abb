"""Which interface gloo is told to listen on where ranks are on several hosts."""

from __future__ import annotations

import datetime
import os
import sys

import pytest
import torch.distributed as dist

import dhf
from dhf.comm.connect import _reach_other_hosts
from dhf.comm.interface import interface_of, is_loopback, route
from dhf.comm.launch import Launch

linux = pytest.mark.skipif(sys.platform != "linux", reason="interfaces are found by address on Linux alone")


def test_the_way_to_a_host() -> None:
    assert route("127.0.0.1") == ("127.0.0.1", "127.0.0.1")
    here, there = route("localhost") or ("", "")
    assert is_loopback(here)
    assert is_loopback(there)
    assert route("no-such-host.invalid") is None


@pytest.mark.parametrize(
    ("address", "loopback"),
    [("127.0.0.1", True), ("127.0.1.1", True), ("::1", True), ("10.0.0.1", False), ("fe80::1%eth0", False)],
)
def test_loopback(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback


@linux
def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None
    assert interface_of("2001:db8::1") is None
    if route("::1") is not None:
        assert interface_of("::1") == "lo"


# two hosts of two ranks each: `host-0` holds the store at 10.0.0.1, which it knows itself as 127.0.1.1

CONNECT = sys.modules[_reach_other_hosts.__module__]  # dhf.comm.connect is the function
MEETING, OTHER = ("127.0.0.1", "127.0.1.1"), ("10.0.0.2", "10.0.0.1")
INTERFACES = {"127.0.0.1": "lo", "10.0.0.1": "ib0", "10.0.0.2": "ib1"}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    """A store, and no choice of the user's."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # is put back afterwards, whatever dhf sets
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(CONNECT, "interface_of", INTERFACES.get)
    store = dist.HashStore()
    store.set_timeout(datetime.timedelta(seconds=0.2))
    return store


def choose(
    monkeypatch: pytest.MonkeyPatch, store: dist.Store, way: tuple[str, str] | None, rank: int = 0, size: int = 4
) -> str | None:
    """What a rank tells gloo."""
    monkeypatch.setattr(CONNECT, "route", lambda host: way)
    _reach_other_hosts(Launch("torchrun", rank, size, 0, 2, "host-0", 29500), store)
    return os.environ.pop("GLOO_SOCKET_IFNAME", None)


def test_every_host_takes_the_interface_that_leads_to_the_meeting_host(monkeypatch, store) -> None:
    assert choose(monkeypatch, store, OTHER, 3) == "ib1"
    assert choose(monkeypatch, store, MEETING) == "ib0"


def test_the_last_rank_may_be_on_the_meeting_host(monkeypatch, store) -> None:
    assert choose(monkeypatch, store, OTHER, 2) == "ib1"
    with pytest.raises(dhf.CommunicationError, match="rank 0 of 4: not all ranks came to host-0:29500 in time"):
        choose(monkeypatch, store, MEETING)
    assert choose(monkeypatch, store, MEETING, 3) == "ib0"
    assert choose(monkeypatch, store, MEETING) == "ib0"


def test_several_hosts_that_are_one(monkeypatch, store) -> None:
    for rank in (1, 2, 3):
        store.set(f"way/{rank}", "")
    assert choose(monkeypatch, store, MEETING) == "lo"


def test_a_host_that_knows_its_own_address_needs_nobody(monkeypatch, store) -> None:
    assert choose(monkeypatch, store, ("10.0.0.1", "10.0.0.1")) == "ib0"


def test_the_users_choice_stays_and_the_others_are_told(monkeypatch, store) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert choose(monkeypatch, store, OTHER, 3) == "eth7"
    assert choose(monkeypatch, store, MEETING) == "ib0"


def test_gloo_chooses_where_nothing_is_known(monkeypatch, store) -> None:
    assert choose(monkeypatch, store, None) is None
    assert choose(monkeypatch, store, ("10.0.0.9", "10.0.0.1"), 2) is None
    assert choose(monkeypatch, store, ("10.0.0.1", "10.0.0.1"), size=2) is None
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert choose(monkeypatch, store, OTHER, 2) is None
