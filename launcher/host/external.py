"""`launch worker`: others start the processes, as srun does, or ssh to all VMs. Process 0 supervises."""

import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

from configs.errors import UserError
from launcher.gang import Exit, drain
from launcher.plan import Plan
from launcher.rundir import RunDirectory

# Sent in the place of an attempt's number: there is nothing to do, or process 0 was refused.
CANCELLED, REFUSED = 0, -1
# What a host that waits for process 0 takes for an attempt when it is asked to stop.
STOPPED = -2


class WorkerHost(Protocol):
    """The host of one process, and its worker."""

    process: int
    node: str
    """Name or address of the host, for messages."""

    def rendezvous(self, attempt: int | None) -> tuple[int, str]:
        """Meet the other hosts: process 0 announces `attempt` and the coordinator's address, which all return.

        The other processes pass None. Raises UserError where a host does not come.
        """

    def start(self, plan: Plan, attempt: int, coordinator: str) -> None:
        """Start the worker. Raises UserError."""

    def cancel(self, reason: int = CANCELLED) -> None:
        """Called on process 0: announce CANCELLED or REFUSED to the others, in the place of an attempt."""

    def wait(self) -> int:
        """Exit code of the worker, or minus the signal that killed it, SIGTERM where it was stopped before it began."""

    def request_stop(self) -> None:
        """Have the worker save and end, also one that starts later."""

    def kill(self) -> None: ...


def start_worker_on(host: WorkerHost, run: RunDirectory, attempt: int | None = None) -> bool:
    """Meet the other hosts and start the worker; False where process 0 has cancelled the start.

    Raises UserError where process 0 was refused, or a host does not come.
    """
    attempt, coordinator = host.rendezvous(attempt)
    if attempt == STOPPED:
        return True  # what `wait` tells
    if attempt == REFUSED:
        raise UserError("process 0 was refused; its own message says why")
    if attempt == CANCELLED:
        return False
    plan = run.plan()
    assert plan is not None  # written before the attempt began
    host.start(plan, attempt, coordinator)
    return True


class ExternalGang:
    """The gang as process 0 sees it, which knows only how its own worker ended."""

    def __init__(
        self, host: WorkerHost, run: RunDirectory, attempt: int, processes: int, stopped_by: Callable[[], str]
    ):
        self._host, self._processes = host, processes
        self.stopped_by = stopped_by
        self.request_stop = host.request_stop
        self.kill = self.detach = host.kill  # nothing of this gang can go on without its launcher
        self._exits: queue.SimpleQueue[Exit] = queue.SimpleQueue()
        start_worker_on(host, run, attempt)
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        code = self._host.wait()
        # Nobody tells this process how the others end. jax ends them all when one fails, so its own end stands for all.
        for process in range(self._processes):
            self._exits.put(Exit(process, code, self._host.node if process == 0 else ""))

    def poll(self, timeout: float) -> list[Exit]:
        return drain(self._exits, timeout)


class ExternalExecutor:
    """The supervisor's view of processes that it has not started. They take one attempt."""

    REMOTE = False

    def __init__(self, host: WorkerHost, job_info: dict[str, Any], stopped_by: Callable[[], str]):
        self._host, self._job_info, self._stopped_by = host, job_info, stopped_by

    def start(self, plan: Plan, run: RunDirectory, attempt: int) -> ExternalGang:
        return ExternalGang(self._host, run, attempt, plan.processes, self._stopped_by)

    def adopt(self, plan: Plan, run: RunDirectory, attempt: int) -> None:
        """None, since a worker ends with the `launch worker` that started it."""

    def job_info(self) -> dict[str, Any]:
        return self._job_info

    def can_restart(self, plan: Plan, run: RunDirectory) -> bool:
        # The other hosts' `launch worker` end with their workers, and nobody would start them again.
        return False
