"""Hosts on this machine, for the clusters of the tests: network namespaces behind one bridge.

The machine itself is the network's first host. There is one bridge, so only one cluster at a time.
"""

import os
import shutil
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

BRIDGE, NETWORK = "podlaunch0", "10.77.0"
HERE = f"{NETWORK}.1"


@dataclass(frozen=True)
class Host:
    name: str
    number: int
    """The last part of its address."""

    @property
    def address(self) -> str:
        return f"{NETWORK}.{self.number}"

    @property
    def namespace(self) -> str:
        return f"podlaunch-{self.name}"

    @property
    def veth(self) -> str:
        return f"podlaunch{self.number}"  # of 15 characters at most

    def pids(self) -> set[int]:
        """All processes there."""
        return {int(pid) for pid in ip("netns", "pids", self.namespace).split()}

    def cut_off(self) -> None:
        """Take it off the network; what runs there runs on."""
        ip("link", "set", self.veth, "down", check=True)

    def reconnect(self) -> None:
        ip("link", "set", self.veth, "up", check=True)


def missing(programs: Iterable[str]) -> str | None:
    """Why no cluster that needs these programs can be raised here, or None."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    if Path(f"/sys/class/net/{BRIDGE}").exists():
        return f"its network {BRIDGE} is there already; end what raised it, or `ip link delete {BRIDGE}`"
    absent = [program for program in programs if not shutil.which(program)]
    return f"not installed: {', '.join(absent)} (make testbed)" if absent else None


def skip_without(reason: str | None, what: str) -> None:
    """Where a testbed cannot be raised for some `reason`. CI runs its tests."""
    if reason:
        assert "CI" not in os.environ, f"CI runs these tests: {reason}"
        pytest.skip(f"no {what} testbed: {reason}")


def make(hosts: Iterable[Host]) -> None:
    ip("link", "add", BRIDGE, "type", "bridge", check=True)
    ip("address", "add", f"{HERE}/24", "dev", BRIDGE, check=True)
    ip("link", "set", BRIDGE, "up", check=True)
    for host in hosts:
        space = host.namespace
        ip("netns", "add", space, check=True)
        ip("link", "add", host.veth, "type", "veth", "peer", "eth0", "netns", space, check=True)
        ip("link", "set", host.veth, "master", BRIDGE, "up", check=True)
        ip("-n", space, "address", "add", f"{host.address}/24", "dev", "eth0", check=True)
        for device in ("lo", "eth0"):
            ip("-n", space, "link", "set", device, "up", check=True)


def remove(hosts: Iterable[Host]) -> None:
    """End all processes of the hosts, then the network, as far as it was made."""
    for host in hosts:
        kill(host.pids())
        ip("link", "delete", host.veth)  # the namespace may live on in a socket that is not quite closed
        ip("netns", "delete", host.namespace)
    ip("link", "delete", BRIDGE)


def kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, 9)


def ip(*arguments: str, check: bool = False) -> str:
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True).stdout
