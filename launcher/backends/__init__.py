"""How a plan's processes are started, watched and stopped. A new scheduler is one file and one line.

Hosts' reports come back through the run directory, the same for all, so supervise.py never asks which
backend it has.
"""

import importlib
from dataclasses import dataclass
from typing import Protocol, cast

from launcher.plan import Plan
from launcher.rundir import RunDirectory

BACKENDS = {"local": "launcher.backends.local"}


@dataclass(frozen=True)
class Exit:
    """One process ended: its exit code, or minus the signal that killed it."""

    process: int
    code: int


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


class Backend(Protocol):
    def render(self, plan: Plan) -> str:
        """The files and commands that `start` would use, for reading. Pure; a dry run stops here."""
        ...

    def start(self, plan: Plan, run: RunDirectory, attempt: int) -> Gang: ...


def get(name: str) -> Backend:
    return cast(Backend, importlib.import_module(BACKENDS[name]))
