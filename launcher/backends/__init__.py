"""How a plan's processes are started, watched and stopped. A new scheduler is one file and one line.

Hosts' reports come back through the run directory, the same for all, so supervise.py never asks which
backend it has.
"""

import importlib
import queue
from dataclasses import dataclass
from typing import Any, Protocol, cast

from launcher.plan import Plan
from launcher.rundir import RunDirectory

BACKENDS = {
    "local": "launcher.backends.local",
    "slurm": "launcher.backends.slurm",
    "tpu": "launcher.backends.tpu",
}
# Cause of an Exit: the host was taken away. Nobody's failure, and the run goes on elsewhere.
PREEMPTED = "preempted"


@dataclass(frozen=True)
class Exit:
    """One process ended."""

    process: int
    code: int
    """Its exit code, or minus the signal that killed it."""
    host: str = ""
    """Where it ran, if the backend knows."""
    cause: str = ""
    """What happened, where that is neither an exit code nor a signal."""
    error: str = ""
    """What the process itself had no chance to say."""


@dataclass(frozen=True)
class State:
    """How a run stands."""

    word: str
    """`queued`, `running`, `completed`, `stopped`, `preempted`, `failed`, `interrupted`, or `unknown` for now."""
    detail: str = ""
    """Why it waits, until when; or what the scheduler says of its end."""

    @property
    def is_active(self) -> bool:
        return self.word in ("queued", "running", "unknown")

    def __str__(self) -> str:
        return f"{self.word}: {self.detail}" if self.detail else self.word


class Gang(Protocol):
    """The processes of one attempt."""

    def poll(self, timeout: float) -> list[Exit]:
        """Processes that ended since the last call, in that order; waits up to `timeout` seconds for one."""
        ...

    def ask_to_stop(self) -> None:
        """Have every process save at a common step and exit with 75."""
        ...

    def kill(self) -> None:
        """End what is left of the gang, at once."""
        ...

    def leave(self) -> None:
        """Let the processes go on without this launcher, if they can."""
        ...

    def stopped_by(self) -> str:
        """Who had it save and end, if not the launcher: `stopped` by the user, or `preempted`."""
        ...


class Starter(Protocol):
    """What supervise.py needs of a backend."""

    REMOTE: bool
    """Processes live on without their launcher, on hosts that are replaced when they are taken away."""

    def start(self, plan: Plan, run: RunDirectory, attempt: int) -> Gang: ...

    def adopt(self, plan: Plan, run: RunDirectory, attempt: int) -> Gang | None:
        """The processes of an attempt whose launcher is gone, where they are to be found."""
        ...

    def ledger(self) -> dict[str, Any]:
        """`job` and `restart_count` of where attempts run, for their ledger; nulls where there is no scheduler."""
        ...

    def can_restart(self, plan: Plan, run: RunDirectory) -> bool:
        """Whether these hosts can take another attempt after a failure. If not, the run is to go on elsewhere."""
        ...


class Backend(Starter, Protocol):
    ASK_SECONDS: float
    """`state` is not asked more often, unless the run directory has news."""

    def render(self, plan: Plan) -> str:
        """The files and commands that would be used, for reading. Pure; a dry run stops here."""
        ...

    def check(self, plan: Plan) -> None:
        """Raises UserError where the plan cannot be started from here."""
        ...

    def state(self, run: RunDirectory) -> State: ...


class Queue(Backend, Protocol):
    """A backend that can have a plan run later, by a launcher in a job of its own."""

    def submit(self, plan: Plan, run: RunDirectory) -> str:
        """The id of the job. Raises UserError where the scheduler refuses it."""
        ...

    def cancel(self, run: RunDirectory) -> None:
        """Take the job of a run out of the queue, or end it."""
        ...

    def go_on_later(self, plan: Plan, run: RunDirectory) -> str:
        """Have the job in which this is called run once more; what was done, in words."""
        ...

    def stay_ended(self) -> None:
        """Have the job in which this is called not run once more, though its scheduler may want it to."""
        ...


class Remote(Backend, Protocol):
    """A backend whose hosts are created for a run, and cost money until they are deleted."""

    def settle(self, plan: Plan) -> Plan:
        """The plan with what was left to this machine's defaults, so that another machine can go on with it."""
        ...

    def offer(self, plan: Plan, run: RunDirectory) -> str | None:
        """What `acquire` would create, and its price; None where the hosts are there. Raises UserError."""
        ...

    def acquire(self, plan: Plan, run: RunDirectory) -> None:
        """Ask for the hosts; they come later. Raises UserError where that is refused."""
        ...

    def release(self, plan: Plan, run: RunDirectory) -> str:
        """Delete what was created, unless it is to be kept; what was done, in words."""
        ...

    def shell(self, plan: Plan, run: RunDirectory, host: int, command: tuple[str, ...]) -> int:
        """A shell on a host, or a command; its exit code."""
        ...


def get(name: str) -> Backend:
    return cast(Backend, importlib.import_module(BACKENDS[name]))


def queue_of(name: str) -> Queue:
    return cast(Queue, get(name))


def remote(name: str) -> Remote:
    return cast(Remote, get(name))


def ended(run: RunDirectory) -> State:
    """How a run stands whose launcher is gone, by its own record."""
    result = run.result()
    return State(result["status"] if result else "interrupted")


def drain(items: "queue.SimpleQueue[Any]", timeout: float) -> list[Any]:
    """What is in the queue; waits up to `timeout` seconds for the first."""
    found = []
    try:
        found.append(items.get(timeout=timeout))
        while True:
            found.append(items.get_nowait())
    except queue.Empty:
        return found
