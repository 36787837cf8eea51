"""Hosts on this machine, for the clusters of the tests: network namespaces behind a bridge.

The machine itself is the first host of each network. A network is known by its number, which is held by a lock
that goes with the process: so several stand side by side, also of two test runs, and what a killed one has left
is cleared away by the next that gets its number.
"""

import fcntl
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

LOCKS = Path("/run/podlaunch-tests")
BOOT_ID = "/proc/sys/kernel/random/boot_id"
"""By which XLA tells hosts apart. A host of a testbed binds the file of its own over it."""
NUMBERS = range(1, 251)


@dataclass(frozen=True)
class Host:
    network: int
    name: str
    number: int
    """The last part of its address."""

    @property
    def address(self) -> str:
        return f"10.77.{self.network}.{self.number}"

    @property
    def namespace(self) -> str:
        return f"{_prefix(self.network)}-{self.name}"

    @property
    def veth(self) -> str:
        return f"{_prefix(self.network)}-{self.number}"  # of 15 characters at most

    @property
    def boot_id(self) -> str:
        return str(uuid.uuid5(uuid.NAMESPACE_OID, self.namespace))

    def pids(self) -> set[int]:
        """All processes there."""
        return _pids(self.namespace)

    def inside(self, *command: str) -> list[str]:
        """The command line of a command in its namespace.

        Not by `ip netns exec`: it mounts /sys anew, and slurmd then finds no cgroups.
        """
        return ["nsenter", f"--net=/run/netns/{self.namespace}", *command]

    def cut_off(self) -> None:
        """Take it off the network; what runs there runs on."""
        ip("link", "set", self.veth, "down", check=True)

    def reconnect(self) -> None:
        ip("link", "set", self.veth, "up", check=True)


@dataclass(frozen=True)
class Network:
    here: str
    """This machine's address."""
    hosts: tuple[Host, ...]


def missing(programs: Iterable[str]) -> str | None:
    """Why no cluster that needs these programs can be raised here, or None."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    absent = [program for program in programs if not shutil.which(program)]
    return f"not installed: {', '.join(absent)} (make testbed)" if absent else None


def skip_without(reason: str | None, what: str) -> None:
    """Where a testbed cannot be raised for some `reason`. CI runs its tests."""
    if reason:
        assert "CI" not in os.environ, f"CI runs these tests: {reason}"
        pytest.skip(f"no {what} testbed: {reason}")


@contextmanager
def raised(names: Iterable[str], *, first: int) -> Iterator[Network]:
    """A network of hosts with these names, their addresses from `.first` on; with them ends all that runs there."""
    with _number() as number:
        hosts = tuple(Host(number, name, k) for k, name in enumerate(names, start=first))
        try:
            yield _made(number, hosts)
        finally:
            _remove(number)


@contextmanager
def _number() -> Iterator[int]:
    """One that nobody has, of a network that is not there any more."""
    number, lock = _locked()
    with lock:
        _remove(number)
        yield number


def _locked() -> tuple[int, IO[str]]:
    LOCKS.mkdir(exist_ok=True)
    for number in NUMBERS:
        lock = (LOCKS / str(number)).open("w")
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return number, lock
        lock.close()
    raise AssertionError(f"all networks of {LOCKS} are in use")


def _prefix(number: int) -> str:
    """Of the names of all that belongs to a network."""
    return f"testbed{number}"


def _made(number: int, hosts: tuple[Host, ...]) -> Network:
    bridge, here = _prefix(number), f"10.77.{number}.1"
    ip("link", "add", bridge, "type", "bridge", check=True)
    ip("address", "add", f"{here}/24", "dev", bridge, check=True)
    ip("link", "set", bridge, "up", check=True)
    for host in hosts:
        space = host.namespace
        ip("netns", "add", space, check=True)
        ip("link", "add", host.veth, "type", "veth", "peer", "eth0", "netns", space, check=True)
        ip("link", "set", host.veth, "master", bridge, "up", check=True)
        ip("-n", space, "address", "add", f"{host.address}/24", "dev", "eth0", check=True)
        for device in ("lo", "eth0"):
            ip("-n", space, "link", "set", device, "up", check=True)
    return Network(here, hosts)


def _remove(number: int) -> None:
    """End all processes of its hosts, then the network, as far as it was made."""
    prefix = _prefix(number)
    for space in _starting(f"{prefix}-", ip("netns", "list").splitlines()):
        while pids := _pids(space):  # which may start others meanwhile
            kill(pids)
        ip("netns", "delete", space)
    # The namespace of one may live on in a socket that is not quite closed.
    for link in _starting(f"{prefix}-", os.listdir("/sys/class/net")):
        ip("link", "delete", link)
    ip("link", "delete", prefix)


def _starting(prefix: str, lines: Iterable[str]) -> list[str]:
    return [line.split()[0] for line in lines if line.startswith(prefix)]


def _pids(space: str) -> set[int]:
    return {int(pid) for pid in ip("netns", "pids", space).split()}


def kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, 9)


def ip(*arguments: str, check: bool = False) -> str:
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True).stdout
