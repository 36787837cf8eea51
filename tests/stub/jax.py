"""What a worker asks of jax: processes that meet at the coordinator's address, and end when one of them is lost."""

import json
import os
import socket
import sys
import time
from types import SimpleNamespace
from typing import Any

LOSS_SECONDS = 0.5
"""After which the loss of a process ends the others."""

config = SimpleNamespace(update=lambda name, value: None)
_process, _processes = 0, 1
_peers: list[Any] = []
"""Connections, as files: process 0 has one to each of the others by number, they have one to it."""


def process_index() -> int:
    return _process


def process_count() -> int:
    return _processes


def local_device_count() -> int:
    return int(os.environ["JAX_NUM_CPU_DEVICES"])


def devices() -> list[SimpleNamespace]:
    return [SimpleNamespace(device_kind="cpu")] * (_processes * local_device_count())


def default_backend() -> str:
    return os.environ["JAX_PLATFORMS"]


def gather(word: Any) -> list[Any]:
    """The words of all processes, in order, once all have said theirs."""
    try:
        if _process == 0:
            words = [word, *map(_hear, _peers)]
            for peer in _peers:
                _say(peer, words)
            return words
        _say(_peers[0], word)
        return _hear(_peers[0])
    except (OSError, ValueError) as e:
        print(f"process {_process} has lost another: {e}", file=sys.stderr, flush=True)
        time.sleep(LOSS_SECONDS)
        os.abort()  # as jax does


def _initialize(
    coordinator: str, processes: int, process: int, *, coordinator_bind_address: str, initialization_timeout: float,
    heartbeat_timeout_seconds: float, **_: Any,
) -> None:  # fmt: skip
    global _process, _processes
    _process, _processes = process, processes
    deadline = time.monotonic() + initialization_timeout
    host, _, port = (coordinator if process else coordinator_bind_address).rpartition(":")
    address = host, int(port)
    if process == 0:
        with socket.create_server(address, backlog=processes, reuse_port=True) as server:
            server.settimeout(initialization_timeout)
            met = [_file(server.accept()[0], heartbeat_timeout_seconds) for _ in range(processes - 1)]
        numbers = [_hear(peer) for peer in met]
        _peers.extend(peer for _, peer in sorted(zip(numbers, met, strict=True), key=lambda pair: pair[0]))
    else:
        _peers.append(_file(_connected(address, deadline), heartbeat_timeout_seconds))
        _say(_peers[0], process)
    gather("initialized")


def _connected(address: tuple[str, int], deadline: float) -> socket.socket:
    while True:
        try:
            return socket.create_connection(address, 5)
        except OSError:  # process 0 is not there yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _file(connection: socket.socket, timeout: float) -> Any:
    connection.settimeout(timeout)
    return connection.makefile("rw")


def _hear(peer: Any) -> Any:
    return json.loads(peer.readline())  # nothing, at the end of file, is no JSON


def _say(peer: Any, word: Any) -> None:
    peer.write(json.dumps(word) + "\n")
    peer.flush()


distributed = SimpleNamespace(initialize=_initialize, shutdown=lambda: gather("over"))
