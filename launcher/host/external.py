"""`launch worker`: others start the processes, as srun does, or ssh to all VMs. Process 0 supervises."""

import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

from launcher.gang import Exit, drain
from launcher.plan import Plan
from launcher.rundir import RunDirectory

# Sent in the place of an attempt's number: there is nothing to do, or process 0 was refused.
CANCELLED, REFUSED = 0, -1
REFUSED_MESSAGE = "process 0 was refused; see what it has said"


class WorkerHost(Protocol):
    """The host of one process, and its worker."""

    node: str

    def start(self, attempt: int | None = None) -> bool:
        """Meet the other hosts and start the worker; False where process 0 cancels the start.

        Process 0 alone names an attempt.
        """
        ...

    def cancel(self, reason: int = CANCELLED) -> None:
        """Called on process 0: tell the others that nothing starts."""
        ...

    def wait(self) -> int:
        """Exit code of the worker, or minus the signal that killed it."""
        ...

    def request_stop(self) -> None: ...

    def kill(self) -> None: ...


class ExternalGang:
    """The gang as process 0 sees it, which knows only how its own worker ended."""

    def __init__(self, host: WorkerHost, attempt: int, processes: int, stopped_by: Callable[[], str]):
        self._host, self._processes = host, processes
        self.stopped_by = stopped_by
        self._exits: queue.SimpleQueue[Exit] = queue.SimpleQueue()
        host.start(attempt)
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        code = self._host.wait()
        for process in range(self._processes):
            self._exits.put(Exit(process, code, self._host.node if process == 0 else ""))

    def poll(self, timeout: float) -> list[Exit]:
        return drain(self._exits, timeout)

    def request_stop(self) -> None:
        self._host.request_stop()

    def kill(self) -> None:
        self._host.kill()

    def detach(self) -> None:
        raise AssertionError("the gang ends with its launcher")


class ExternalExecutor:
    """The supervisor's view of processes that it has not started. They take one attempt."""

    REMOTE = False

    def __init__(self, host: WorkerHost, job_info: dict[str, Any], stopped_by: Callable[[], str]):
        self._host, self._job_info, self._stopped_by = host, job_info, stopped_by

    def start(self, plan: Plan, run: RunDirectory, attempt: int) -> ExternalGang:
        return ExternalGang(self._host, attempt, plan.processes, self._stopped_by)

    def adopt(self, plan: Plan, run: RunDirectory, attempt: int) -> None:
        pass

    def job_info(self) -> dict[str, Any]:
        return self._job_info

    def can_restart(self, plan: Plan, run: RunDirectory) -> bool:
        return False
