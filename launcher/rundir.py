"""The run directory: the one place where a run's plan, attempts, logs and result are kept.

plan.json       the plan of the newest launch
attempts.jsonl  a line an attempt that ended
result.json     how the run ended
hosts/H.json    the newest word of each process of the current attempt
job             the SLURM job that the run is, or was last
first-attempt   number of the first attempt of the newest launch
excluded-nodes  nodes that failed twice since then
checkpoints/ tensorboard/ logs/attempt-K/host-H.log
logs/attempt-K/where.json logs/meeting-STEP
                where an attempt runs; how the tasks of a SLURM step find each other
.lock .id       held by its launcher; tells it apart from a run of the same name elsewhere
"""

import errno
import fcntl
import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import gethostname
from typing import IO, Any
from uuid import uuid4

from configs import checkpoints
from configs.errors import UserError
from configs.files import write_atomically
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


class RunDirectory:
    def __init__(self, path: Path):
        self.path = path

    @property
    def name(self) -> str:
        return self.path.name

    # Plan

    def plan(self) -> Plan | None:
        path = self.path / "plan.json"
        text = _read(path)
        try:
            return Plan.from_json(text) if text else None
        except (ValueError, TypeError) as e:
            raise UserError(
                f"{path} is not a plan of this podlaunch ({e}); choose another --name or --root"
            ) from None

    def create(self, plan: Plan) -> None:
        """Make the folder and write the plan. Raises UserError where it cannot be written."""
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / "plan.json", plan.to_json())

    @contextmanager
    def undone_if_refused(self) -> Iterator[None]:
        """What is refused, or interrupted, leaves nothing behind that was not there before."""
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
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise UserError(
                f"run directory {self.path} cannot be written: {e.strerror}; choose another place with --root"
            ) from None

    @contextmanager
    def locked(self, *, patience_seconds: float = 0.25) -> Iterator[None]:
        """Hold the run for this launcher, before anything of it is written; the lock goes with the process."""
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            f = (self.path / ".lock").open("w")
        with f:
            if not _flock(f, patience_seconds):
                raise UserError(
                    f"run {self.name} is running already; see `launch status {self.name}`, end it with "
                    f"`launch stop {self.name}`, or begin another with --name"
                )
            yield

    def is_running(self) -> bool:
        """Whether some launcher holds the run."""
        try:
            with (self.path / ".lock").open("r") as f:
                fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    # Attempts and result

    def attempts(self) -> list[dict[str, Any]]:
        attempts = []
        for line in (_read(self.path / "attempts.jsonl") or "").split("\n"):
            with suppress(json.JSONDecodeError):  # a crash may have cut it
                attempts.append(json.loads(line))
        return attempts

    def attempts_of_launch(self) -> list[dict[str, Any]]:
        """Those since `launch` was typed, over all jobs in which it went on."""
        first = int(_read(self.path / "first-attempt") or 1)
        return [a for a in self.attempts() if a["attempt"] >= first]

    def add_attempt(self, attempt: dict[str, Any]) -> None:
        written = _read(self.path / "attempts.jsonl") or ""
        with self._writing(), (self.path / "attempts.jsonl").open("a", encoding="utf-8") as f:
            if written and not written.endswith("\n"):
                f.write("\n")  # behind a line that a crash has cut
            f.write(json.dumps(attempt, ensure_ascii=False) + "\n")

    def result(self) -> dict[str, Any] | None:
        text = _read(self.path / "result.json")
        return json.loads(text) if text else None

    def write_result(self, result: dict[str, Any]) -> None:
        with self._writing():
            write_atomically(self.path / "result.json", json.dumps(result, indent=2, ensure_ascii=False))

    # The word of the hosts

    def begin_attempt(self, where: dict[str, Any]) -> int:
        """Number of the next attempt; its logs folder is made, words of the one before are cleared."""
        number = self.last_attempt() + 1
        with self._writing():
            (self.path / "result.json").unlink(missing_ok=True)
            shutil.rmtree(self.path / "hosts", ignore_errors=True)
            (self.path / "hosts").mkdir()
            self.logs(number).mkdir(parents=True)
            write_atomically(self.logs(number) / "where.json", json.dumps(where))
        return number

    def where(self, attempt: int) -> dict[str, Any]:
        """Where an attempt runs, or ran: cluster, mesh, job."""
        return json.loads(_read(self.logs(attempt) / "where.json") or "{}")

    def last_attempt(self) -> int:
        """Number of the newest attempt, 0 before the first."""
        folders = (self.path / "logs").glob("attempt-*")
        return max((int(p.name.removeprefix("attempt-")) for p in folders), default=0)

    def logs(self, attempt: int) -> Path:
        return self.path / "logs" / f"attempt-{attempt}"

    def log(self, attempt: int, process: int) -> Path:
        return self.logs(attempt) / f"host-{process}.log"

    def report(self, process: int) -> dict[str, Any]:
        """The newest word of one process, empty before its first."""
        return json.loads(_read(self.path / "hosts" / f"{process}.json") or "{}")

    def write_report(self, process: int, report: dict[str, Any]) -> None:
        write_atomically(self.path / "hosts" / f"{process}.json", json.dumps(report))

    def meeting(self, step: str) -> Path:
        """Where process 0 of a step tells the others how to join it."""
        return self.path / "logs" / f"meeting-{step}"

    # The job in which it runs, where there is a scheduler

    def job(self) -> str | None:
        return (_read(self.path / "job") or "").strip() or None

    def begin(self, job: str | None) -> None:
        """Before the first attempt of a launch: forget what was asked of the one before, and how it ended."""
        self.clear_stop()
        (self.path / "result.json").unlink(missing_ok=True)
        self.exclude_nodes([])
        self.write_job(job)
        with self._writing():
            write_atomically(self.path / "first-attempt", str(self.last_attempt() + 1))

    def write_job(self, job: str | None) -> None:
        with self._writing():
            write_atomically(self.path / "job", job or "")

    def excluded_nodes(self) -> list[str]:
        return (_read(self.path / "excluded-nodes") or "").split()

    def exclude_nodes(self, nodes: list[str]) -> None:
        with self._writing():
            write_atomically(self.path / "excluded-nodes", "".join(f"{node}\n" for node in nodes))

    # Stop requests, which reach the launcher from any terminal

    def request_stop(self) -> None:
        (self.path / "stop").touch()

    def clear_stop(self) -> None:
        (self.path / "stop").unlink(missing_ok=True)

    def stop_requested(self) -> bool:
        return (self.path / "stop").exists()

    # Checkpoints

    def checkpoints(self, plan: Plan | None = None) -> str:
        """Where they are: folder or gs:// prefix. By `plan`, else by the newest launch."""
        plan = plan or self.plan()
        configured = plan.config["checkpoint"].get("directory") if plan else None
        return configured or str(self.path / "checkpoints")

    def checkpoint_steps(self, plan: Plan | None = None) -> list[int]:
        """Steps of the complete checkpoints, oldest first. Raises UserError where they cannot be looked up."""
        return checkpoints.steps(self.checkpoints(plan))

    def claim_checkpoints(self, plan: Plan) -> None:
        """Make a place outside this directory that of this run alone. Raises UserError where it is another's."""
        place = self.checkpoints(plan)
        if place == str(self.path / "checkpoints"):
            return
        with self._writing(), (self.path / ".id").open("a+") as f:
            f.seek(0)
            identity = f.read()
            if not identity:
                identity = uuid4().hex
                f.write(identity)
        owner = {
            "run": self.name,
            "directory": str(self.path.absolute()),
            "host": gethostname(),
            "id": identity,
        }
        checkpoints.claim(place, owner)


def runs(root: Path) -> list[RunDirectory]:
    """All runs below `root`, the one used last first."""
    plans = sorted(root.glob("*/plan.json"), key=lambda p: p.stat().st_mtime, reverse=True)
    return [RunDirectory(p.parent) for p in plans]


def _flock(file: IO[str], patience_seconds: float) -> bool:
    """Take the lock. Some tries: `launch list` holds it, too, for the instant in which it looks."""
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            return True  # some parallel file systems have no locks
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
