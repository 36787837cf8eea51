"""P processes on this machine, each in its own session so that Ctrl-C reaches the launcher alone.

A worker's standard input is a pipe that nobody writes to. When the launcher ends, in whatever way, the pipe closes,
and the worker ends too.
"""

import queue
import shlex
import subprocess
import threading
from typing import Any

from launcher.gang import Exit, State, drain, recorded_state
from launcher.host.process import WORKER, kill_group, start_worker, worker_environment
from launcher.machine.network import reserve_port
from launcher.plan import Plan
from launcher.rundir import RunDirectory

REMOTE = False
HOST = "127.0.0.1"
POLL_SECONDS = 0.0  # the state is a look at the lock file


def render(plan: Plan) -> str:
    return "\n".join(_command_line(plan, process) for process in range(plan.processes))


def _command_line(plan: Plan, process: int) -> str:
    environment = worker_environment(plan, process, f"{HOST}:PORT")
    # Only the values are quoted: a shell would take a quoted assignment for the name of a program.
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in environment.items()), shlex.join(WORKER)])


def start(plan: Plan, run: RunDirectory, attempt: int) -> "LocalGang":
    return LocalGang(plan, run, attempt)


def adopt(plan: Plan, run: RunDirectory, attempt: int) -> None:
    """None, since the workers of a lost launcher have ended with it."""


def check(plan: Plan) -> None:
    """The plan has checked everything already."""


def job_info() -> dict[str, Any]:
    return {"job": None, "restart_count": None}


def can_restart(plan: Plan, run: RunDirectory) -> bool:
    return True


def state(run: RunDirectory) -> State:
    return State("running") if run.is_running() else recorded_state(run)


class LocalGang:
    def __init__(self, plan: Plan, run: RunDirectory, attempt: int):
        self._port = reserve_port(HOST)  # as long as the gang exists
        coordinator = f"{HOST}:{self._port.getsockname()[1]}"
        self._exits: queue.SimpleQueue[Exit] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []
        for process in range(plan.processes):
            self._processes.append(start_worker(run, attempt, worker_environment(plan, process, coordinator)))
            # A waiting thread for each: the order of the exits tells the cause from its consequences.
            threading.Thread(target=self._wait, args=(process,), daemon=True).start()

    def _wait(self, process: int) -> None:
        self._exits.put(Exit(process, self._processes[process].wait()))

    def poll(self, timeout: float) -> list[Exit]:
        return drain(self._exits, timeout)

    def request_stop(self) -> None:
        for process in self._processes:
            process.terminate()

    def kill(self) -> None:
        for process in self._processes:
            kill_group(process)

    detach = kill  # the processes cannot go on without the launcher

    def stopped_by(self) -> str:
        return "preempted"
