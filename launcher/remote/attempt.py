"""What the three stages of a remote gang share: the plan, where its phases are reported, and whether to go on."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

from configs.clusters import TpuCluster
from launcher.gang import Exit
from launcher.plan import Plan
from launcher.rundir import RunDirectory


class StoppedError(Exception):
    """The gang is to end, or was left to another launcher, before its workers were started."""


class RemoteAttempt:
    def __init__(self, plan: Plan, run: RunDirectory, number: int):
        self.plan, self.run, self.number = plan, run, number
        self.cluster = TpuCluster.model_validate(plan.submission)
        self.stopping = threading.Event()
        """The gang is to end."""
        self.detached = threading.Event()
        """The processes go on without this launcher."""
        self.seconds: dict[str, float] = {}
        """Seconds of each part of the start."""

    def check_stopped(self) -> None:
        """Raises StoppedError."""
        if self.stopping.is_set() or self.detached.is_set():
            raise StoppedError

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Record the seconds of a part of the start. Raises StoppedError after it."""
        started = time.monotonic()
        yield
        self.seconds[part] = round(time.monotonic() - started, 3)
        self.check_stopped()

    def report_phase(self, phase: str, *, queued: bool = False) -> None:
        """Report in the place of process 0, which does not run yet."""
        self.run.hosts.write_report(0, {"phase": phase, "queued": queued, "time": time.time()})

    def exits_of_all(self, first: Exit) -> list[Exit]:
        """`first`, and the exits of all other processes because of it."""
        others = [process for process in range(self.plan.processes) if process != first.process]
        return [first, *(Exit(process, -signal.SIGTERM) for process in others)]
