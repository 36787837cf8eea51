"""RunDirectory: the plan, the lock, stop requests and checkpoints of a run; its other files by their purpose."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from socket import gethostname
from typing import Any
from uuid import uuid4

from configs import checkpoints
from configs.errors import UserError
from configs.files import write_atomically
from launcher.plan import Plan
from launcher.rundir import shared, storage
from launcher.rundir.attempts import Attempts
from launcher.rundir.hosts import HostFiles, Rendezvous
from launcher.rundir.job import JobFiles
from launcher.rundir.lease import LEASE, HeldError
from launcher.rundir.resources import FILE as RESOURCES
from launcher.rundir.resources import Resources

TAIL_BYTES = 8192
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def check_name(name: str, origin: str = "") -> str:
    """`name`, if a run can have it: the name becomes a folder, an object prefix and part of job names.

    Raises UserError; `origin` says where a default name comes from.
    """
    if not NAME.fullmatch(name):
        raise UserError(
            f"--name {name!r}: a run name has 1 to 63 letters, digits, dots, dashes and underscores, "
            f"and begins with a letter or digit" + (f" (this is {origin})" if origin else "")
        )
    return name


def run_id(location: str) -> str:
    """16 hexadecimal digits that identify a run on every machine, by the location of its run directory."""
    return hashlib.sha256(location.encode()).hexdigest()[:16]


class RunHeldError(UserError):
    """Another launcher supervises the run, or has supervised it to its end."""


class RunDirectory:
    def __init__(self, location: Path | str):
        """`location`: a folder, or gs://bucket/prefix. Nothing is created."""
        self._files = storage.open_files(str(location))
        self.location = self._files.location
        self.name = self.location.rpartition("/")[2]
        self.attempts = Attempts(self._files)
        self.hosts = HostFiles(self._files)
        self.rendezvous = Rendezvous(self._files)
        self.job = JobFiles(self._files)
        self.resources = Resources(self._files)

    @property
    def is_shared(self) -> bool:
        """Whether it is under gs://, where others may write."""
        return self.location.startswith("gs://")

    @property
    def path(self) -> Path:
        """The folder of a run directory that is not under gs://."""
        assert not self.is_shared
        return Path(self.location)

    def refresh(self) -> None:
        """Have the next reads answer as of now; those of a bucket may otherwise be some seconds old."""
        self._files.refresh()

    def read_tail(self, name: str) -> str:
        """The end of a log, empty where there is none."""
        return self._files.read_from(name, 0)[-TAIL_BYTES:].decode(errors="replace")

    # Plan and code

    def plan(self) -> Plan | None:
        """The plan of the newest launch. Raises UserError where plan.json is not one of this podlaunch."""
        text = self._files.read("plan.json")
        try:
            plan = Plan.from_json(text) if text else None
            return shared.as_data(plan, self.location) if plan and self.is_shared else plan
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            problem = f"{self.location}/plan.json is not a plan of this podlaunch ({e})"
            raise UserError(f"{problem}; choose another --name or --root") from None

    def write_plan(self, plan: Plan) -> None:
        """Raises UserError where the directory cannot be written."""
        stored = shared.without_own_settings(plan) if self.is_shared else plan
        self._files.write("plan.json", stored.to_json())

    @contextmanager
    def planned(self, plan: Plan) -> Iterator[None]:
        """Write the plan before what it needs is rented, so that others find the run if this launcher is killed here.

        Where the context ends by an exception and nothing is rented, all is as it was before.
        """
        before = self._files.read("plan.json")
        self.write_plan(plan)
        try:
            yield
        except BaseException:
            if self.resources.unreleased():
                raise
            if before is None:
                for name in ("plan.json", "code.tar.gz"):
                    self._files.delete(name)
                self.resources.forget()
            else:
                self._files.write("plan.json", before)
            raise

    def code(self) -> bytes:
        """The archive of the code for the hosts; empty where there is none."""
        return self._files.read_from("code.tar.gz", 0)

    def write_code(self, packed: bytes) -> None:
        self._files.write("code.tar.gz", packed)

    def has_foreign_files(self) -> bool:
        """Whether this directory, which has no plan, contains files that are not a run's."""
        ours = (LEASE, RESOURCES, "rendezvous", "code.tar.gz")  # these may be there without a plan
        return any(not name.startswith(".") and name not in ours for name in self._files.names())

    # The launcher that holds the run

    @contextmanager
    def locked(self, *, timeout_seconds: float = 0.25) -> Iterator[None]:
        """Hold the run for this launcher; the lock ends with the process. Raises RunHeldError."""
        with ExitStack() as stack:
            try:  # around the entry alone: an error of the run itself is another matter
                stack.enter_context(self._files.locked(timeout_seconds))
            except HeldError as e:
                by = f", supervised by {e}" if str(e) else ""
                raise RunHeldError(
                    f"run {self.name} is running already{by}; see `launch status {self.name}`, end it with "
                    f"`launch stop {self.name}`, or begin another with --name"
                ) from None
            yield

    @contextmanager
    def locked_or_rolled_back(self) -> Iterator[None]:
        """Hold the run; if this context ends by an error, the directory is as it was, or absent again.

        Not if it ends by Ctrl-C, when what was begun elsewhere may have succeeded. Raises RunHeldError.
        """
        absent = [path for path in (self.path, *self.path.parents) if not path.exists()]
        with self.locked():
            before = {} if absent else {path: _content(path) for path in self.path.iterdir()}
            try:
                yield
            except Exception:
                _restore(self.path, before)
                for folder in absent:
                    with suppress(OSError):  # another run has been made in the folder meanwhile
                        folder.rmdir()
                raise

    def is_running(self) -> bool:
        """Whether some launcher holds the run."""
        return self._files.is_held()

    def is_lost(self, *, refresh: bool = False) -> bool:
        """Whether another launcher has taken the run over from this one; `refresh`: ask anew, not by the last renewal."""
        return self._files.is_lost(refresh=refresh)

    def begin_launch(self, job: str | None) -> None:
        """Before the first attempt of a launch: forget stop requests, result and excluded nodes of the one before."""
        # A stop request of the launch before would end this one at once, and its result would look like this one's.
        self.clear_stop()
        self._files.delete("result.json")
        self.job.write_bad_nodes([], exclude=False)
        self.job.write_id(job)
        self.attempts.begin_launch()

    def result(self) -> dict[str, Any] | None:
        return storage.read_object(self._files, "result.json") or None

    def write_result(self, result: dict[str, Any]) -> None:
        self._files.write("result.json", json.dumps(result, indent=2, ensure_ascii=False))

    # Stop requests reach the launcher from any terminal

    def request_stop(self) -> None:
        self._files.write("stop", "stop")

    def clear_stop(self) -> None:
        self._files.delete("stop")

    def stop_requested(self) -> bool:
        return self._files.read("stop") is not None

    # Checkpoints and events may lie elsewhere

    def checkpoints(self, plan: Plan | None = None) -> str:
        """Location of the checkpoints, by `plan` or else by the plan of the newest launch."""
        plan = plan or self.plan()
        configured = plan.config["checkpoint"].get("directory") if plan else None
        return configured or f"{self.location}/checkpoints"

    def tensorboard(self) -> str:
        """Location of the event files."""
        plan = self.plan()
        configured = plan.config["log"]["tensorboard"] if plan else None
        return configured or f"{self.location}/tensorboard"

    def checkpoint_steps(self, plan: Plan | None = None) -> list[int]:
        """Steps of the complete checkpoints, oldest first. Raises UserError where they cannot be listed."""
        return checkpoints.steps(self.checkpoints(plan))

    def claim_checkpoints(self, plan: Plan) -> None:
        """Reserve a location outside this directory for this run. Raises UserError where another run has it."""
        location = self.checkpoints(plan)
        if location == f"{self.location}/checkpoints":
            return
        identity = self._files.read(".id")
        if not identity:
            identity = uuid4().hex
            self._files.write(".id", identity)
        directory = self.location if self.is_shared else str(self.path.absolute())
        claim = {"run": self.name, "directory": directory, "host": gethostname(), "id": identity}
        checkpoints.claim(location, claim)


def _content(path: Path) -> bytes | None:
    """The content of a file; None for a folder."""
    return None if path.is_dir() else path.read_bytes()


def _restore(folder: Path, before: Mapping[Path, bytes | None]) -> None:
    """Have a folder contain the files that it had before, and no new folders."""
    for entry in set(folder.iterdir()) - before.keys():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for path, content in before.items():
        if content is not None and (not path.exists() or path.read_bytes() != content):
            write_atomically(path, content)


def list_runs(*roots: Path | str) -> list[RunDirectory]:
    """All runs below `roots`, the one launched last first."""
    found = storage.list_plans(*map(str, roots))
    # Others who write to a bucket may choose names that are none of a run's.
    return [RunDirectory(place) for place in found if NAME.fullmatch(place.rpartition("/")[2])]
