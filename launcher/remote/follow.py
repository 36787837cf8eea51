"""Third stage of a remote gang: follow the agents, and tell a lost host from a lost connection.

An agent knows how its worker ends, so a connection may break at any time, and another launcher can follow the same
agents later.
"""

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

from configs.errors import UserError
from configs.google import UnreachableError
from launcher.gang import PREEMPTED, Exit
from launcher.providers import Machine
from launcher.remote.attempt import RemoteAttempt
from launcher.remote.hosts import Hosts
from launcher.remote.prepare import remote_program
from launcher.remote.rental import GONE
from launcher.remote.ssh import Ssh, last_lines

# How often the provider is asked for the condition of the hosts; while one is silent, more often.
CHECK_SECONDS = 15.0
SUSPECT_CHECK_SECONDS = 2.0
# A VM that exists, but has been out of reach for so long, is given up.
LOST_SECONDS = 60.0
# A living host reports to the run directory at least every half minute, and clocks may differ.
REPORT_SECONDS = 90.0
RECONNECT_SECONDS = 1.0

Ended = Callable[[float, Exit], None]
"""Called with the time at which a process ended, and its exit."""


class Follower:
    def __init__(self, attempt: RemoteAttempt, hosts: Hosts, ended: Ended):
        self._attempt, self._hosts, self._ended = attempt, hosts, ended
        self.running = set(range(attempt.plan.processes))
        """Processes whose end has not been seen; the gang removes the others."""
        self._machines: list[Machine] = []
        self._channels: dict[int, subprocess.Popen[bytes]] = {}
        self._commands: list[bytes] = []
        """`stop` and `kill`, which are repeated to hosts that are out of reach at the moment."""
        self._lock = threading.Lock()
        self._silent_since: dict[int, float] = {}
        self._last_errors: dict[int, str] = {}
        self._checked = 0.0

    def send(self, command: bytes) -> None:
        """Send `stop` or `kill` to all agents."""
        with self._lock:
            self._commands.append(command)
            for channel in self._channels.values():
                _send(channel, command)

    def disconnect(self) -> None:
        with self._lock:
            for channel in self._channels.values():
                channel.terminate()

    def follow(self, ssh: Ssh, machines: list[Machine]) -> None:
        """Return when all agents have ended, or the gang was left to another launcher."""
        self._machines = machines
        agents = self._attempt.run.attempts.info(self._attempt.number)["agents"]
        threads = [
            threading.Thread(target=self._follow_agent, args=(ssh, process, *agents[process]), daemon=True)
            for process in range(self._attempt.plan.processes)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not self._attempt.detached.wait(1.0):
            if self.running:
                self._check_hosts()

    def _follow_agent(self, ssh: Ssh, process: int, folder: str, python: str) -> None:
        try:
            self._follow_until_exit(ssh, process, folder, python)
        except Exception as e:  # noqa: BLE001 (the outermost layer of this thread: nobody else would end the attempt)
            host = self._machines[process].internal
            self._ended(time.time(), Exit(process, 1, host, "launcher failed", f"{type(e).__name__}: {e}"))

    def _follow_until_exit(self, ssh: Ssh, process: int, folder: str, python: str) -> None:
        """Read the agent's journal, over as many connections as that takes."""
        attempt = self._attempt
        number = str(attempt.number)
        command = remote_program(attempt.cluster, folder, python, "agent", "watch", folder, number)
        while process in self.running and not attempt.detached.is_set():
            channel = ssh.open(process, *command)
            with self._lock:
                self._channels[process] = channel
                for earlier in self._commands:
                    _send(channel, earlier)
            assert channel.stdout is not None
            assert channel.stderr is not None
            for line in channel.stdout:
                self._silent_since.pop(process, None)
                entry = json.loads(line) if line.startswith(b"{") else {}  # a login shell may print as well
                if "exit" in entry:
                    self._ended(entry["time"], self._exit(process, entry))
                    channel.terminate()
                    return
            self._last_errors[process] = "".join(last_lines(channel.stderr.read()))
            self._silent_since.setdefault(process, time.monotonic())
            channel.wait()  # reaps the process of ssh
            attempt.detached.wait(RECONNECT_SECONDS)

    def _exit(self, process: int, entry: dict[str, Any]) -> Exit:
        host = entry.get("host", self._machines[process].internal)
        return Exit(process, entry["exit"], host, entry.get("cause", ""), entry.get("error", ""))

    def _check_hosts(self) -> None:
        """End the attempt where its hosts were taken away, or one is lost."""
        now = time.monotonic()
        since = self._silent_since.copy()  # a copy, since the threads that follow the agents change it
        silent = {process: now - since[process] for process in since.keys() & self.running}
        if now - self._checked < (SUSPECT_CHECK_SECONDS if silent else CHECK_SECONDS):
            return
        self._checked = now
        try:
            condition = self._hosts.condition()
        except (UnreachableError, UserError):
            # This machine is cut off from the provider, too, so it is no wonder that it hears nothing of the hosts.
            self._silent_since = dict.fromkeys(self._silent_since, time.monotonic())
            return
        name = self._hosts.name
        if condition.status in GONE:
            process = min(self.running, default=0)
            host = self._machines[process].internal
            for exit_ in self._attempt.exits_of_all(
                Exit(process, 1, host, PREEMPTED, f"{name} is {condition}")
            ):
                self._ended(time.time(), exit_)
            self._attempt.detached.set()
            return
        for process, seconds in silent.items():
            if seconds > LOST_SECONDS and not self._reports(process):
                # A host that Google repairs or restarts is nobody's failure.
                cause = "lost" if condition.status == "ready" else PREEMPTED
                error = f"no report for {seconds:.0f} s, while {name} is {condition.status}: "
                error += self._last_errors.get(process, "")
                self._ended(time.time(), Exit(process, 1, self._machines[process].internal, cause, error))

    def _reports(self, process: int) -> bool:
        """Whether a host still reports to the run directory, so that only the way to it is blocked."""
        return time.time() - self._attempt.run.hosts.report(process).get("time", 0.0) < REPORT_SECONDS


def _send(channel: subprocess.Popen[bytes], command: bytes) -> None:
    assert channel.stdin is not None
    with contextlib.suppress(OSError):  # the connection has ended
        channel.stdin.write(command)
        channel.stdin.flush()
