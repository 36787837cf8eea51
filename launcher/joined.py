"""`launch worker`: each process is started by others, as by srun or by ssh to all VMs. Process 0 supervises."""

import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

from launcher.backends import Exit, drain
from launcher.host import CALLED_OFF
from launcher.plan import Plan
from launcher.rundir import RunDirectory


class JoinedHost(Protocol):
    """Where this process is, and its worker."""

    node: str

    def start(self, attempt: int | None = None) -> bool:
        """Meet the others and start the worker, unless process 0, which alone names an attempt, calls it off."""
        ...

    def call_off(self, why: int = CALLED_OFF) -> None: ...

    def wait(self) -> int:
        """Exit code of the worker, or minus the signal that killed it."""
        ...

    def ask_to_stop(self) -> None: ...

    def kill(self) -> None: ...


class JoinedGang:
    """The gang as process 0 sees it: it knows how it ended itself."""

    def __init__(self, host: JoinedHost, attempt: int, processes: int, stopped_by: Callable[[], str]):
        self._host, self._processes = host, processes
        self.stopped_by = stopped_by
        self._news: queue.SimpleQueue[Exit] = queue.SimpleQueue()
        host.start(attempt)
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        code = self._host.wait()
        for process in range(self._processes):
            self._news.put(Exit(process, code, self._host.node if process == 0 else ""))

    def poll(self, timeout: float) -> list[Exit]:
        return drain(self._news, timeout)

    def ask_to_stop(self) -> None:
        self._host.ask_to_stop()

    def kill(self) -> None:
        self._host.kill()

    def leave(self) -> None:
        raise AssertionError("it ends with its launcher")


class Joined:
    """What supervise.py needs to be told of it."""

    REMOTE = False

    def __init__(self, host: JoinedHost, ledger: dict[str, Any], stopped_by: Callable[[], str]):
        self._host, self._ledger, self._stopped_by = host, ledger, stopped_by

    def start(self, plan: Plan, run: RunDirectory, attempt: int) -> JoinedGang:
        return JoinedGang(self._host, attempt, plan.processes, self._stopped_by)

    def adopt(self, plan: Plan, run: RunDirectory, attempt: int) -> None:
        pass

    def ledger(self) -> dict[str, Any]:
        return self._ledger

    def can_restart(self, plan: Plan, run: RunDirectory) -> bool:
        return False
