"""The protocols between supervisor, backends and gangs: the methods that each offers to the others.

Hosts' reports come back through the run directory, the same for all backends, so supervise.py never asks which
backend it has.
"""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from launcher.plan import Plan
from launcher.rundir import RunDirectory

# Exit code: the user has to mend something, so that it is not tried again.
EXIT_USER_ERROR = 2
# Cause of an Exit: the host was taken away. This is nobody's failure, and the run goes on elsewhere.
PREEMPTED = "preempted"
# Cause of an Exit: the backend could start no process at all, for which no host is to blame.
STEP_FAILED = "srun failed"
# Cause of an Exit: the kernel ended the process, because memory ran out.
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Exit:
    """One process ended."""

    process: int
    code: int
    """Exit code of the process, or minus the signal that killed it."""
    host: str = ""
    """Where the process ran, if the backend knows."""
    cause: str = ""
    """`lost`, `not started` or the like, where neither the exit code nor a signal tells the cause."""
    error: str = ""
    """An error message in the name of the process, which could not report it any more."""


@dataclass(frozen=True)
class State:
    """How a run stands."""

    status: str
    """`queued`, `running`, `completed`, `stopped`, `preempted`, `failed`, `interrupted`, or `unknown` for now."""
    detail: str = ""
    """Why the run is queued, or what the scheduler says of its end."""
    costs: str = ""
    """What a run that has ended still has, and still costs money."""
    lines: tuple[str, ...] = ()
    """The last lines of the log of a launcher that ended without a result."""

    @property
    def is_active(self) -> bool:
        return self.status in ("queued", "running", "unknown")

    def __str__(self) -> str:
        return ": ".join([self.status, *filter(None, [self.detail, self.costs])])


@dataclass(frozen=True)
class Released:
    """What became of the hosts of a run at its end."""

    sentence: str
    costs_money: bool = False
    """Hosts that were to be deleted may still exist."""


class Gang(Protocol):
    """The processes of one attempt."""

    def poll(self, timeout: float) -> list[Exit]:
        """Processes that have ended since the last call, in the order of their ends; waits up to `timeout` seconds."""

    def request_stop(self) -> None:
        """Have every process save at a common step and exit with 75."""

    def kill(self) -> None:
        """End the processes that still run, at once."""

    def detach(self) -> None:
        """Let the processes go on without this launcher; those that cannot are ended."""

    def stopped_by(self) -> str:
        """Who had the gang save and end, if the launcher did not: `stopped` by the user, or `preempted`."""


class Executor(Protocol):
    """Starts the gang of an attempt, for the supervisor."""

    REMOTE: bool
    """The processes outlive their launcher, on hosts that are replaced when they are taken away."""

    def start(self, plan: Plan, run: RunDirectory, attempt: int) -> Gang:
        """Start the processes of attempt number `attempt`. What goes wrong then, the gang reports as exits."""

    def adopt(self, plan: Plan, run: RunDirectory, attempt: int) -> Gang | None:
        """The gang of an attempt whose launcher is gone; None where its processes cannot be found."""

    def job_info(self) -> dict[str, Any]:
        """`job` and `restart_count` for the record of an attempt; None for both where there is no scheduler."""

    def can_restart(self, plan: Plan, run: RunDirectory) -> bool:
        """Whether these hosts can take another attempt after a failure. If not, the run has to go on elsewhere."""


class Backend(Executor, Protocol):
    """A way to run plans on one kind of cluster."""

    POLL_SECONDS: float
    """Shortest interval between two calls of `state`, unless the run directory has news."""

    def render(self, plan: Plan) -> str:
        """The files and commands that would be used, for reading. Pure; a dry run stops here."""

    def check(self, plan: Plan) -> None:
        """Raises UserError where the plan cannot be started from here."""

    def state(self, run: RunDirectory) -> State:
        """How a run stands, also one of another launcher; `unknown` where the scheduler or cloud does not answer."""


class Queue(Backend, Protocol):
    """A backend that can have a plan run later, by a launcher in a job of its own."""

    def ignored(self) -> str:
        """What of the user's environment the job does not get although it may be meant so; empty if nothing."""

    def submit(self, plan: Plan, run: RunDirectory) -> str:
        """Submit the job that runs the plan; its id. Raises UserError where the scheduler refuses the job."""

    def cancel(self, run: RunDirectory) -> None:
        """Take the job of a run out of the queue, or end it. Raises UserError where the scheduler refuses."""

    def requeue(self, plan: Plan, run: RunDirectory) -> str:
        """Have the job in which this is called run once more; a sentence that says what was done."""

    def prevent_requeue(self) -> None:
        """Keep the scheduler from running the job in which this is called once more."""


class Remote(Backend, Protocol):
    """A backend whose hosts are created for a run, and cost money until they are deleted."""

    def resolve(self, plan: Plan) -> Plan:
        """The plan with this machine's defaults filled in, so that another machine can resume it."""

    def quote(self, plan: Plan, run: RunDirectory) -> str | None:
        """Hosts that `acquire` would create, and their price; None where they exist. Raises UserError where it cannot."""

    def estimate(self, plan: Plan) -> str:
        """What the hosts of a plan cost, whether they exist or not. Pure."""

    def acquire(self, plan: Plan, run: RunDirectory) -> None:
        """Request the hosts, which come later; recorded first. Raises UserError where the request is refused."""

    def release(
        self, plan: Plan, run: RunDirectory, announce: Callable[[str], None], give_up: threading.Event
    ) -> Released:
        """Delete the hosts, unless they are to be kept, and try for long; `announce` is told of each failure."""

    def shell(self, plan: Plan, run: RunDirectory, host: int, command: tuple[str, ...]) -> int:
        """Run a shell, or `command`, on a host; its exit code. Raises UserError where the host is not there."""


def recorded_state(run: RunDirectory) -> State:
    """The state of a run without a launcher, as its result says."""
    result = run.result()
    return State(result["status"] if result else "interrupted")


def drain(items: "queue.SimpleQueue[Any]", timeout: float) -> list[Any]:
    """All items of a queue; waits up to `timeout` seconds for the first."""
    found = []
    try:
        found.append(items.get(timeout=timeout))
        while True:
            found.append(items.get_nowait())
    except queue.Empty:
        return found
