"""The run directory: the one place where a run's plan, attempts, logs and result are kept.

plan.json       the plan of the newest launch
attempts.jsonl  a line an attempt that ended
result.json     how the run ended
hosts/H.json    the newest word of each process of the current attempt
job             the SLURM job that the run is, or was last
first-attempt   number of the first attempt of the newest launch
excluded-nodes  nodes that failed twice since then
checkpoints/ tensorboard/ logs/attempt-K/host-H.log
logs/attempt-K/where.json logs/meeting-STEP meeting/
                where an attempt runs; how the tasks of a SLURM step, and the VMs of a slice, find each other
.lock .id       held by its launcher; tells it apart from a run of the same name elsewhere
lease.json      under gs://, in the place of .lock
code.tar.gz     what hosts without a shared disk get
"""

import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from socket import gethostname
from typing import Any
from uuid import uuid4

from configs import checkpoints
from configs.errors import UserError
from launcher import storage
from launcher.plan import Plan

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def check_name(name: str, origin: str = "") -> str:
    """`name` if it can be a run's: it becomes a folder, an object prefix and part of job names."""
    if not NAME.fullmatch(name):
        raise UserError(
            f"--name {name!r}: a run name has 1 to 63 letters, digits, dots, dashes and underscores, "
            f"and begins with a letter or digit" + (f" (this is {origin})" if origin else "")
        )
    return name


class Elsewhere(UserError):  # noqa: N818
    """Another launcher has the run, or had it to its end."""


class RunDirectory:
    def __init__(self, place: Path | str):
        """`place`: a folder, or gs://bucket/prefix."""
        self._files = storage.files(str(place))
        self.place = self._files.place
        self.name = self.place.rpartition("/")[2]

    @property
    def path(self) -> Path:
        """Where it is a folder, that."""
        assert not self.place.startswith("gs://")
        return Path(self.place)

    # Plan

    def plan(self) -> Plan | None:
        text = self._files.read("plan.json")
        try:
            return Plan.from_json(text) if text else None
        except (ValueError, TypeError) as e:
            raise UserError(
                f"{self.place}/plan.json is not a plan of this podlaunch ({e}); choose another --name or --root"
            ) from None

    def create(self, plan: Plan) -> None:
        """Write the plan. Raises UserError where it cannot be written."""
        self._files.write("plan.json", plan.to_json())

    def code(self) -> bytes:
        """The archive of the code that its hosts get."""
        return self._files.read_from("code.tar.gz", 0)

    def write_code(self, packed: bytes) -> None:
        self._files.write("code.tar.gz", packed)

    def is_strange(self) -> bool:
        """Whether something else lies here."""
        ours = (storage.LEASE, "meeting", "code.tar.gz")
        return any(not name.startswith(".") and name not in ours for name in self._files.names())

    @contextmanager
    def undone_if_refused(self) -> Iterator[None]:
        """What is refused, or interrupted, leaves nothing behind in a folder that was not there before."""
        absent = [path for path in (self.path, *self.path.parents) if not path.exists()]
        before = set() if absent else set(self.path.iterdir())
        try:
            yield
        except BaseException:
            for entry in set(self.path.iterdir()) - before if self.path.is_dir() else ():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            for folder in absent:
                with suppress(OSError):  # somebody else's run is in it
                    folder.rmdir()
            raise

    @contextmanager
    def locked(self, *, patience_seconds: float = 0.25) -> Iterator[None]:
        """Hold the run for this launcher, before anything of it is written; the lock goes with the process."""
        with ExitStack() as stack:
            try:
                stack.enter_context(self._files.locked(patience_seconds))
            except storage.Held as e:
                by = f", under {e}" if str(e) else ""
                raise Elsewhere(
                    f"run {self.name} is running already{by}; see `launch status {self.name}`, end it with "
                    f"`launch stop {self.name}`, or begin another with --name"
                ) from None
            yield

    def is_running(self) -> bool:
        """Whether some launcher holds the run."""
        return self._files.is_held()

    def is_lost(self, *, look: bool = False) -> bool:
        """Whether another launcher has taken the run over from this one; `look`: as of now."""
        return self._files.is_lost(look=look)

    # Attempts and result

    def attempts(self) -> list[dict[str, Any]]:
        attempts = []
        for line in (self._files.read("attempts.jsonl") or "").split("\n"):
            with suppress(json.JSONDecodeError):  # a crash may have cut it
                attempts.append(json.loads(line))
        return attempts

    def attempts_of_launch(self) -> list[dict[str, Any]]:
        """Those since `launch` was typed, over all jobs in which it went on."""
        first = int(self._files.read("first-attempt") or 1)
        return [a for a in self.attempts() if a["attempt"] >= first]

    def add_attempt(self, attempt: dict[str, Any]) -> None:
        written = self._files.read("attempts.jsonl") or ""
        if written and not written.endswith("\n"):
            written += "\n"  # behind a line that a crash has cut
        self._files.write("attempts.jsonl", f"{written}{json.dumps(attempt, ensure_ascii=False)}\n")

    def result(self) -> dict[str, Any] | None:
        text = self._files.read("result.json")
        return json.loads(text) if text else None

    def write_result(self, result: dict[str, Any]) -> None:
        self._files.write("result.json", json.dumps(result, indent=2, ensure_ascii=False))

    # The word of the hosts

    def begin_attempt(self, where: dict[str, Any]) -> int:
        """Number of the next attempt; words of the one before are cleared."""
        number = self.last_attempt() + 1
        self._files.delete("result.json")
        self._files.delete("hosts")
        self.write_where(number, where | {"begun": time.time()})
        return number

    def where(self, attempt: int) -> dict[str, Any]:
        """Where an attempt runs, or ran: cluster, mesh, job; and since when."""
        return json.loads(self._files.read(f"logs/attempt-{attempt}/where.json") or "{}")

    def write_where(self, attempt: int, where: dict[str, Any]) -> None:
        self._files.write(f"logs/attempt-{attempt}/where.json", json.dumps(where))

    def last_attempt(self) -> int:
        """Number of the newest attempt, 0 before the first."""
        folders = [name for name in self._files.names("logs") if name.startswith("attempt-")]
        return max((int(name.removeprefix("attempt-")) for name in folders), default=0)

    def logs(self, attempt: int) -> str:
        """Where the logs of an attempt are."""
        return f"{self.place}/logs/attempt-{attempt}"

    def log(self, attempt: int, process: int) -> Path:
        """Where a process writes its log."""
        return self.path / f"logs/attempt-{attempt}/host-{process}.log"

    def read_log(self, attempt: int, process: int, offset: int = 0) -> bytes:
        """What the log of a process has from `offset` on; nothing where there is none."""
        return self._files.read_from(f"logs/attempt-{attempt}/host-{process}.log", offset)

    def write_log(self, attempt: int, process: int, text: str) -> None:
        self._files.write(f"logs/attempt-{attempt}/host-{process}.log", text)

    def report(self, process: int) -> dict[str, Any]:
        """The newest word of one process, empty before its first."""
        return json.loads(self._files.read(f"hosts/{process}.json") or "{}")

    def write_report(self, process: int, report: dict[str, Any]) -> None:
        self._files.write(f"hosts/{process}.json", json.dumps(report))

    def meeting(self, step: str) -> Path:
        """Where process 0 of a step tells the others how to join it."""
        return self.path / "logs" / f"meeting-{step}"

    # Where the VMs of a slice meet that have no launcher

    def meeting_words(self) -> dict[str, str]:
        """What was said there, by name."""
        names = self._files.names("meeting")
        return {name: word for name in names if (word := self._files.read(f"meeting/{name}")) is not None}

    def write_meeting(self, name: str, word: str) -> None:
        self._files.write(f"meeting/{name}", word)

    def end_meeting(self) -> None:
        self._files.delete("meeting")

    def refresh(self) -> None:
        """What was read is read again."""
        self._files.refresh()

    # The job in which it runs, where there is a scheduler

    def job(self) -> str | None:
        return (self._files.read("job") or "").strip() or None

    def begin(self, job: str | None) -> None:
        """Before the first attempt of a launch: forget what was asked of the one before, and how it ended."""
        self.clear_stop()
        self._files.delete("result.json")
        self.exclude_nodes([])
        self.write_job(job)
        self._files.write("first-attempt", str(self.last_attempt() + 1))

    def write_job(self, job: str | None) -> None:
        self._files.write("job", job or "")

    def excluded_nodes(self) -> list[str]:
        return (self._files.read("excluded-nodes") or "").split()

    def exclude_nodes(self, nodes: list[str]) -> None:
        self._files.write("excluded-nodes", "".join(f"{node}\n" for node in nodes))

    # Stop requests, which reach the launcher from any terminal

    def request_stop(self) -> None:
        self._files.write("stop", "stop")

    def clear_stop(self) -> None:
        self._files.delete("stop")

    def stop_requested(self) -> bool:
        return self._files.read("stop") is not None

    # Checkpoints

    def checkpoints(self, plan: Plan | None = None) -> str:
        """Where they are: folder or gs:// prefix. By `plan`, else by the newest launch."""
        plan = plan or self.plan()
        configured = plan.config["checkpoint"].get("directory") if plan else None
        return configured or f"{self.place}/checkpoints"

    def tensorboard(self) -> str:
        """Where event files are."""
        plan = self.plan()
        configured = plan.config["log"]["tensorboard"] if plan else None
        return configured or f"{self.place}/tensorboard"

    def checkpoint_steps(self, plan: Plan | None = None) -> list[int]:
        """Steps of the complete checkpoints, oldest first. Raises UserError where they cannot be looked up."""
        return checkpoints.steps(self.checkpoints(plan))

    def claim_checkpoints(self, plan: Plan) -> None:
        """Make a place outside this directory that of this run alone. Raises UserError where it is another's."""
        place = self.checkpoints(plan)
        if place == f"{self.place}/checkpoints":
            return
        identity = self._files.read(".id")
        if not identity:
            identity = uuid4().hex
            self._files.write(".id", identity)
        checkpoints.claim(
            place,
            {
                "run": self.name,
                "directory": self.place if self.place.startswith("gs://") else str(self.path.absolute()),
                "host": gethostname(),
                "id": identity,
            },
        )


def runs(root: Path | str) -> list[RunDirectory]:
    """All runs below `root`, the one launched last first."""
    return [RunDirectory(place) for place in storage.children(str(root))]
