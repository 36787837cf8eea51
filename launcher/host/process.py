"""A worker process on the machine where this runs: its command, its environment, its start."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping

from launcher.plan import Plan
from launcher.rundir import RunDirectory

# jax adds this flag up: an inherited one would contradict the number of CPU devices in the plan.
CPU_DEVICES_FLAG = "--xla_force_host_platform_device_count"
HEARTBEAT_SECONDS = 3.0
"""How often tasks and agents tell the launcher that they live."""


def host_program(name: str, *arguments: str, python: str = sys.executable) -> list[str]:
    """The command of a program of launcher/host/, such as `worker`.

    -P keeps the folder in which the user stands off the module path, and podlaunch.host puts our own home first.
    """
    return [python, "-P", "-m", "podlaunch.host", name, *arguments]


WORKER = host_program("worker", "--exit-with-stdin")


def worker_environment(plan: Plan, process: int, coordinator: str) -> dict[str, str]:
    """The variables that a worker gets besides the user's own."""
    environment = {
        "LAUNCH_COORDINATOR": coordinator,
        "LAUNCH_PROCESSES": str(plan.processes),
        "LAUNCH_PROCESS": str(process),
        "LAUNCH_RUN": plan.run_directory,
    }
    if plan.platform == "cpu":
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(plan.devices_per_process)}
    return environment


def start_worker(run: RunDirectory, attempt: int, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a worker in a session of its own, which writes to its log in `run`.

    The worker ends when the standard input that this process holds is closed.
    """
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if not f.startswith(CPU_DEVICES_FLAG)]
    with run.hosts.log_file(attempt, int(environment["LAUNCH_PROCESS"])).open("ab") as log:
        return subprocess.Popen(
            WORKER,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "XLA_FLAGS": " ".join(flags), **environment},
            start_new_session=True,
        )


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that leads a session of its own, and its children; nothing where it has ended."""
    if process.poll() is None:
        # A thread that waits for the process may have reaped it already, and be about to note its exit code.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def shell_exit_code(code: int) -> int:
    """The exit code as a shell gives it: 128 + N for a process that signal N has killed."""
    return code if code >= 0 else 128 - code
