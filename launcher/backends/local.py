"""P processes on this machine, each in its own session so that Ctrl-C reaches the launcher alone.

A worker's standard input is a pipe that nobody writes to: when the launcher ends, in whatever way, it
closes, and the worker ends too.
"""

import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading

from launcher.backends import Exit
from launcher.plan import Plan
from launcher.rundir import RunDirectory

# -P: a folder called models/ or trainer/ where the user stands must not come before ours.
WORKER = [sys.executable, "-P", "-m", "launcher.worker", "--exit-with-stdin"]
# Not inherited: it would contradict the number of CPU devices that the plan names.
CPU_DEVICES_FLAG = "--xla_force_host_platform_device_count"


def render(plan: Plan) -> str:
    command = shlex.join(WORKER)
    lines = []
    for process in range(plan.processes):
        environment = worker_environment(plan, process, "127.0.0.1:PORT")
        lines.append(" ".join(f"{k}={shlex.quote(v)}" for k, v in environment.items()) + f" {command}")
    return "\n".join(lines)


def start(plan: Plan, run: RunDirectory, attempt: int) -> "LocalGang":
    return LocalGang(plan, run, attempt)


def worker_environment(plan: Plan, process: int, coordinator: str) -> dict[str, str]:
    """What a worker finds in its environment besides the user's own."""
    environment = {
        "LAUNCH_COORDINATOR": coordinator,
        "LAUNCH_PROCESSES": str(plan.processes),
        "LAUNCH_PROCESS": str(process),
        "LAUNCH_RUN": plan.run_directory,
    }
    if plan.platform == "cpu":
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(plan.devices_per_process)}
    return environment


class LocalGang:
    def __init__(self, plan: Plan, run: RunDirectory, attempt: int):
        coordinator = f"127.0.0.1:{_free_port()}"
        inherited = dict(os.environ)
        flags = [f for f in inherited.get("XLA_FLAGS", "").split() if not f.startswith(CPU_DEVICES_FLAG)]
        inherited["XLA_FLAGS"] = " ".join(flags)
        self._ended: queue.SimpleQueue[Exit] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []
        for process in range(plan.processes):
            with run.log(attempt, process).open("ab") as log:
                self._processes.append(
                    subprocess.Popen(
                        WORKER,
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=inherited | worker_environment(plan, process, coordinator),
                        start_new_session=True,
                    )
                )
            # A waiting thread each: the order of deaths tells the cause from its consequences.
            threading.Thread(target=self._wait, args=(process,), daemon=True).start()

    def _wait(self, process: int) -> None:
        self._ended.put(Exit(process, self._processes[process].wait()))

    def poll(self, timeout: float) -> list[Exit]:
        ended = []
        try:
            ended.append(self._ended.get(timeout=timeout))
            while True:
                ended.append(self._ended.get_nowait())
        except queue.Empty:
            return ended

    def ask_to_stop(self) -> None:
        for process in self._processes:
            process.terminate()

    def kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its own session, so its children too


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
