"""On a TPU VM: outlives the connection that started it, runs the worker of one process, keeps gs:// told.

    python -m podlaunch.host agent start FOLDER           reads an Order on standard input, leaves an agent behind
    python -m podlaunch.host agent watch FOLDER ATTEMPT   says what becomes of it; is told `stop` or `kill`

The worker works in a run directory on this VM's disk. Its log and its newest word go to the run's own, on gs://.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import UserError
from launcher import metadata
from launcher.host import HEARTBEAT_SECONDS, start_worker, worker_environment
from launcher.place import hold_port
from launcher.plan import Plan
from launcher.rundir import RunDirectory

FOLDER = "podlaunch"
"""Below a VM's home."""
MIRROR_SECONDS = 3.0
# The words of process 0 are shown; of the others only changes matter, and that they live.
REPORT_SECONDS = 30.0
# A log is sent whole each time it has grown: the longer, the less often.
LOG_BYTES_PER_SECOND = 128 << 10
NOTICE_SECONDS = 2.0
START_SECONDS = 60.0
END_SECONDS = 10.0
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Order:
    """What a launcher wants of an agent."""

    plan: dict[str, Any]
    attempt: int
    process: int
    coordinator: str
    environment: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict, repr=False)
    """More of the worker's environment, which is kept in memory alone."""


def identity(place: str) -> str:
    """Of a run, wherever it is looked at from, by its run directory."""
    return hashlib.sha256(place.encode()).hexdigest()[:16]


def folder_of(place: str, home: Path) -> Path:
    """Where a VM keeps what belongs to a run."""
    return home / FOLDER / identity(place)


def of_slices(coordinator: str, slices: int, index: int) -> dict[str, str]:
    """What libtpu must know where there are several (https://cloud.google.com/tpu/docs/multislice-introduction)."""
    return {
        "MEGASCALE_COORDINATOR_ADDRESS": coordinator,
        "MEGASCALE_NUM_SLICES": str(slices),
        "MEGASCALE_SLICE_ID": str(index),
    }


class Agent:
    """The worker of one process, from its start to its end."""

    def __init__(self, folder: Path, order: Order):
        self._order = order
        self._plan = Plan.from_json(json.dumps(order.plan))
        self._local = RunDirectory(folder / "run")
        self._port: socket.socket | None = None
        self.notice = ""
        self._mirror = Mirror(
            self._local, RunDirectory(self._plan.run_directory), order.attempt, order.process
        )

    def start(self) -> None:
        """Raises UserError or OSError."""
        order = self._order
        plan = dataclasses.replace(self._plan, run_directory=self._local.place)
        shutil.rmtree(self._local.path, ignore_errors=True)  # an earlier attempt's words are not this one's
        self._local.create(plan)
        self._local.write_where(order.attempt, {})
        host, _, port = order.coordinator.rpartition(":")
        if order.process == 0:
            self._port = hold_port(host, int(port))
        environment = worker_environment(plan, order.process, order.coordinator)
        self._worker = start_worker(
            plan, self._local, order.attempt, order.environment | environment | order.secrets
        )
        for work in (self._mirror.run, self._watch_notices):
            threading.Thread(target=work, daemon=True).start()

    def wait(self) -> int:
        """Exit code of the worker, or minus the signal that killed it; all that it said is on gs:// then."""
        code = self._worker.wait()
        self._mirror.finish()
        return code

    def ask_to_stop(self) -> None:
        self._worker.terminate()

    def kill(self) -> None:
        if self._worker.poll() is None:
            os.killpg(self._worker.pid, signal.SIGKILL)

    def _watch_notices(self) -> None:
        """Have the worker save while there is time: all do at a common step."""
        while not self.notice:
            time.sleep(NOTICE_SECONDS)
            self.notice = metadata.notice() or ""
        self.ask_to_stop()


class Mirror:
    """Sends what a process says in its local run directory to the one on gs://."""

    def __init__(self, local: RunDirectory, remote: RunDirectory, attempt: int, process: int):
        self._local, self._remote = local, remote
        self._attempt, self._process = attempt, process
        self._finished = threading.Event()
        self._lock = threading.Lock()
        self._report: dict[str, Any] = {}
        self._log = b""
        self._bytes_sent = 0
        self._report_sent = self._log_sent = 0.0

    def run(self) -> None:
        while not self._finished.wait(MIRROR_SECONDS):
            self._send(all_of_it=False)

    def finish(self) -> None:
        self._finished.set()
        self._send(all_of_it=True)

    def _send(self, *, all_of_it: bool) -> None:
        # What cannot be sent now is in the next round; training does not end for it.
        with self._lock, contextlib.suppress(UserError):
            self._send_report(all_of_it)
            self._send_log(all_of_it)

    def _send_report(self, all_of_it: bool) -> None:
        report = self._local.report(self._process)
        is_news = report.get("phase") != self._report.get("phase") or self._process == 0
        due = time.monotonic() - self._report_sent > REPORT_SECONDS
        if report != self._report and (is_news or due or all_of_it):
            self._remote.write_report(self._process, report)
            self._report, self._report_sent = report, time.monotonic()

    def _send_log(self, all_of_it: bool) -> None:
        self._log += self._local.read_log(self._attempt, self._process, len(self._log))
        due = time.monotonic() - self._log_sent > len(self._log) / LOG_BYTES_PER_SECOND
        if len(self._log) > self._bytes_sent and (due or all_of_it):
            self._remote.write_log(self._attempt, self._process, self._log.decode(errors="replace"))
            self._bytes_sent, self._log_sent = len(self._log), time.monotonic()


# An agent on its own


def _start(folder: Path) -> None:
    """Leave an agent behind for the Order on standard input."""
    order = Order(**json.load(sys.stdin))
    end_previous(folder)
    journal = _journal(folder, order.attempt)
    journal.unlink(missing_ok=True)
    with (folder / "agent.log").open("ab") as log:
        agent = subprocess.Popen(
            [sys.executable, "-P", "-m", "podlaunch.host", "agent", "serve", str(folder)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    assert agent.stdin is not None
    with contextlib.suppress(BrokenPipeError), agent.stdin:  # then its log says why
        agent.stdin.write(json.dumps(dataclasses.asdict(order)).encode())
    deadline = time.monotonic() + START_SECONDS
    while not journal.exists():
        if agent.poll() is not None or time.monotonic() > deadline:
            lines = (folder / "agent.log").read_text(errors="replace").strip().splitlines()
            raise UserError(f"its agent does not start: {lines[-1] if lines else 'it does not say why'}")
        time.sleep(POLL_SECONDS)


def _serve(folder: Path) -> int:
    order = Order(**json.load(sys.stdin))
    journal = _Journal(folder, order)
    _pid_file(folder).write_text(str(os.getpid()))  # before there is a worker to be ended
    try:
        agent = Agent(folder, order)
        agent.start()
        signal.signal(signal.SIGTERM, lambda *_: agent.ask_to_stop())
        signal.signal(signal.SIGUSR1, lambda *_: agent.kill())
        journal()
        code, error = agent.wait(), ""
        journal(exit=code, error=error, notice=agent.notice)
    except UserError as e:
        journal(exit=2, error=str(e))
    except OSError as e:  # a full disk, a port that is taken
        journal(exit=1, error=f"{type(e).__name__}: {e}", cause="not started")
    return 0


class _Journal:
    """What there is to say of an attempt, kept on disk for whoever asks."""

    def __init__(self, folder: Path, order: Order):
        self._path = _journal(folder, order.attempt)
        self._who = {"process": order.process, "host": socket.gethostname(), "pid": os.getpid()}

    def __call__(self, **words: Any) -> None:
        with self._path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(self._who | {"time": time.time()} | words) + "\n")


def _journal(folder: Path, attempt: int) -> Path:
    return folder / f"attempt-{attempt}.jsonl"


def _pid_file(folder: Path) -> Path:
    return folder / "agent.pid"


def agent_pid(folder: Path) -> int | None:
    """Of the agent that lives here."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(_pid_file(folder).read_text())
        command = (
            f"podlaunch.host\0agent\0serve\0{folder}\0".encode()
        )  # a number may be another process's by now
        if command in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    return None


def end_previous(folder: Path) -> None:
    """End the agent that lives here, and its worker with it."""
    _signal(folder, signal.SIGUSR1)
    deadline = time.monotonic() + END_SECONDS
    while agent_pid(folder) is not None:
        if time.monotonic() > deadline:
            _signal(folder, signal.SIGKILL)  # its worker leaves when it finds its standard input closed
            return
        time.sleep(POLL_SECONDS)


def _signal(folder: Path, number: int) -> None:
    pid = agent_pid(folder)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


# What is known of one


def _watch(folder: Path, attempt: int) -> int:
    """Say what the journal says, to its end, and that we are alive."""
    journal = _journal(folder, attempt)
    threading.Thread(target=_obey, args=(folder,), name="commands", daemon=True).start()
    said, heard = 0, 0.0
    while True:
        alive = agent_pid(folder)  # before its last words are looked for
        lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
        for line in lines[said:]:
            print(line, flush=True)
            if "exit" in json.loads(line):
                return 0
        said = len(lines)
        if alive is None:
            words = "its agent was killed" if lines else f"attempt {attempt} is not known there"
            print(json.dumps({"exit": 1, "cause": "lost", "error": words, "time": time.time()}), flush=True)
            return 0
        if time.monotonic() - heard > HEARTBEAT_SECONDS:
            print("{}", flush=True)
            heard = time.monotonic()
        time.sleep(POLL_SECONDS)


def _obey(folder: Path) -> None:
    signals = {b"stop": signal.SIGTERM, b"kill": signal.SIGUSR1}
    for line in sys.stdin.buffer:
        if line.strip() in signals:
            _signal(folder, signals[line.strip()])
    os._exit(0)  # whoever listened has gone; the agent goes on


def main() -> None:
    command, folder = sys.argv[1], Path(sys.argv[2])
    try:
        if command == "start":
            _start(folder)
        elif command == "serve":
            sys.exit(_serve(folder))
        else:
            os._exit(_watch(folder, int(sys.argv[3])))  # at once: its other thread reads for ever
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
