"""The agent on a TPU VM: runs the worker of one process, and outlives the connection that started it.

    python -m podlaunch.host agent start FOLDER           reads a WorkerSpec on standard input, leaves an agent behind
    python -m podlaunch.host agent watch FOLDER ATTEMPT   prints the agent's journal; takes `stop` and `kill`

The worker writes to a run directory on this VM's disk. The agent copies its log and its newest report to the run's
own directory under gs://.
"""

import contextlib
import dataclasses
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
from launcher.host.bootstrap import show_life
from launcher.host.process import (
    HEARTBEAT_SECONDS,
    host_program,
    kill_group,
    start_worker,
    worker_environment,
)
from launcher.machine import metadata
from launcher.machine.network import reserve_port
from launcher.plan import Plan
from launcher.rundir import RunDirectory, run_id

FOLDER = "podlaunch"
"""Folder below the home of a VM."""
MIRROR_SECONDS = 3.0
# The reports of process 0 are shown to the user. Those of the others only tell changes of phase, and that they live.
REPORT_SECONDS = 30.0
# An object cannot be appended to, so a log that has grown is sent whole: the longer it is, the less often.
LOG_BYTES_PER_SECOND = 128 << 10
# Google announces the preemption of a spot VM 30 s ahead, and the save has to fit into that.
NOTICE_SECONDS = 2.0
START_SECONDS = 60.0  # includes the imports of the agent
END_SECONDS = 10.0  # after that the agent itself is killed, and its worker ends by the closed pipe
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class WorkerSpec:
    """The worker that a launcher has an agent run."""

    plan: dict[str, Any]
    attempt: int
    process: int
    coordinator: str
    environment: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict, repr=False)
    """More variables of the worker, which are kept in memory alone."""


def agent_folder(location: str, home: Path) -> Path:
    """The folder in which a VM keeps the files of the run at `location`."""
    return home / FOLDER / run_id(location)


class Agent:
    """Runs the worker of one process, from its start to its end."""

    def __init__(self, folder: Path, spec: WorkerSpec):
        self._spec = spec
        self._plan = Plan(**spec.plan)
        self._local = RunDirectory(folder / "run")
        self._port: socket.socket | None = None
        self.notice = ""
        self._mirror = Mirror(self._local, RunDirectory(self._plan.run_directory), spec.attempt, spec.process)

    def start(self) -> None:
        """Raises UserError or OSError."""
        spec = self._spec
        plan = dataclasses.replace(self._plan, run_directory=self._local.location)
        # Reports of an earlier attempt would be taken for this one's.
        shutil.rmtree(self._local.path, ignore_errors=True)
        self._local.write_plan(plan)
        self._local.attempts.write_info(spec.attempt, {})
        if spec.process == 0:
            host, _, port = spec.coordinator.rpartition(":")
            self._port = reserve_port(host, int(port))
        environment = worker_environment(plan, spec.process, spec.coordinator)
        self._worker = start_worker(self._local, spec.attempt, spec.environment | environment | spec.secrets)
        # Threads, since this one waits for the worker.
        for work in (self._mirror.run, self._watch_notices):
            threading.Thread(target=work, daemon=True).start()

    def wait(self) -> int:
        """Exit code of the worker, or minus the signal that killed it. Its reports and log are under gs:// then."""
        code = self._worker.wait()
        self._mirror.finish()
        return code

    def request_stop(self) -> None:
        self._worker.terminate()

    def kill(self) -> None:
        kill_group(self._worker)

    def _watch_notices(self) -> None:
        """Have the workers save, all at a common step, while there is time. Until then the VM is in use."""
        while not self.notice:
            time.sleep(NOTICE_SECONDS)
            if self._worker.poll() is not None:
                return
            show_life()
            self.notice = metadata.eviction_notice() or ""
        self.request_stop()


class Mirror:
    """Copies report and log of a process from its local run directory to the one under gs://."""

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
            self._send(final=False)

    def finish(self) -> None:
        self._finished.set()
        self._send(final=True)

    def _send(self, *, final: bool) -> None:
        # An unreachable bucket does not end the training: the next round sends the same again.
        with self._lock, contextlib.suppress(UserError):
            self._send_report(final)
            self._send_log(final)

    def _send_report(self, final: bool) -> None:
        report = self._local.hosts.report(self._process)
        is_shown = report.get("phase") != self._report.get("phase") or self._process == 0
        due = time.monotonic() - self._report_sent > REPORT_SECONDS
        if report != self._report and (is_shown or due or final):
            self._remote.hosts.write_report(self._process, report)
            self._report, self._report_sent = report, time.monotonic()

    def _send_log(self, final: bool) -> None:
        self._log += self._local.hosts.read_log(self._attempt, self._process, len(self._log))
        due = time.monotonic() - self._log_sent > len(self._log) / LOG_BYTES_PER_SECOND
        if len(self._log) > self._bytes_sent and (due or final):
            self._remote.hosts.write_log(self._attempt, self._process, self._log.decode(errors="replace"))
            self._bytes_sent, self._log_sent = len(self._log), time.monotonic()


# An agent on its own


def _start(folder: Path) -> None:
    """Leave an agent behind that runs the WorkerSpec on standard input. Raises UserError where it does not start."""
    spec = WorkerSpec(**json.load(sys.stdin))
    end_previous(folder)
    journal = _journal_file(folder, spec.attempt)
    journal.unlink(missing_ok=True)
    with (folder / "agent.log").open("ab") as log:
        agent = subprocess.Popen(
            host_program("agent", "serve", str(folder)),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    assert agent.stdin is not None
    # The spec goes through a pipe, since it may hold secrets, which the command line would show to all users. An
    # agent that ends before it reads says why in its log.
    with contextlib.suppress(BrokenPipeError), agent.stdin:
        agent.stdin.write(json.dumps(dataclasses.asdict(spec)).encode())
    deadline = time.monotonic() + START_SECONDS
    while not journal.exists():
        if agent.poll() is not None or time.monotonic() > deadline:
            lines = (folder / "agent.log").read_text(errors="replace").strip().splitlines()
            raise UserError(f"its agent did not start: {lines[-1] if lines else 'it does not say why'}")
        time.sleep(POLL_SECONDS)


def _serve(folder: Path) -> None:
    spec = WorkerSpec(**json.load(sys.stdin))
    journal = _Journal(folder, spec)
    _pid_file(folder).write_text(str(os.getpid()))  # before there is a worker that others may have to end
    try:
        agent = Agent(folder, spec)
        agent.start()
        signal.signal(signal.SIGTERM, lambda *_: agent.request_stop())
        signal.signal(signal.SIGUSR1, lambda *_: agent.kill())
        journal.write()
        journal.write(exit=agent.wait(), error="", notice=agent.notice)
    except UserError as e:
        journal.write(exit=2, error=str(e))
    except OSError as e:  # a full disk, a port that is taken
        journal.write(exit=1, error=f"{type(e).__name__}: {e}", cause="not started")


class _Journal:
    """The course of an attempt as lines of JSON on disk, which every connection can read from the beginning."""

    def __init__(self, folder: Path, spec: WorkerSpec):
        self._path = _journal_file(folder, spec.attempt)
        self._sender = {"process": spec.process, "host": socket.gethostname(), "pid": os.getpid()}

    def write(self, **fields: Any) -> None:
        with self._path.open("a", encoding="utf-8") as f:
            f.write(json.dumps(self._sender | {"time": time.time()} | fields) + "\n")


def _journal_file(folder: Path, attempt: int) -> Path:
    return folder / f"attempt-{attempt}.jsonl"


def _pid_file(folder: Path) -> Path:
    return folder / "agent.pid"


def agent_pid(folder: Path) -> int | None:
    """Process id of the agent that runs for `folder`; None where none does."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(_pid_file(folder).read_text())
        # The id may be another process's by now, so the command line is compared.
        command = f"agent\0serve\0{folder}\0".encode()
        if command in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    return None


def end_previous(folder: Path) -> None:
    """End the agent that runs for `folder`, and its worker."""
    _signal(folder, signal.SIGUSR1)
    deadline = time.monotonic() + END_SECONDS
    while agent_pid(folder) is not None:
        if time.monotonic() > deadline:
            _signal(folder, signal.SIGKILL)  # the worker ends when its standard input is closed
            return
        time.sleep(POLL_SECONDS)


def _signal(folder: Path, number: int) -> None:
    pid = agent_pid(folder)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


# Watching an agent


def _watch(folder: Path, attempt: int) -> None:
    """Print the journal to its end, with empty objects in between as heartbeats.

    Without heartbeats ssh could not tell a broken connection from an agent that has nothing to say.
    """
    journal = _journal_file(folder, attempt)
    threading.Thread(target=_read_commands, args=(folder,), name="commands", daemon=True).start()
    printed, last_heartbeat = 0, 0.0
    while True:
        alive = agent_pid(folder)  # asked first, so that the last line of an agent that ends is not missed
        lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
        for line in lines[printed:]:
            print(line, flush=True)
            if "exit" in json.loads(line):
                return
        printed = len(lines)
        if alive is None:
            error = "its agent was killed" if lines else f"it has no record of attempt {attempt}"
            print(json.dumps({"exit": 1, "cause": "lost", "error": error, "time": time.time()}), flush=True)
            return
        if time.monotonic() - last_heartbeat > HEARTBEAT_SECONDS:
            print("{}", flush=True)
            last_heartbeat = time.monotonic()
        time.sleep(POLL_SECONDS)


def _read_commands(folder: Path) -> None:
    signals = {b"stop": signal.SIGTERM, b"kill": signal.SIGUSR1}
    for line in sys.stdin.buffer:
        if line.strip() in signals:
            _signal(folder, signals[line.strip()])
    os._exit(0)  # the connection is closed; the agent goes on


def main() -> None:
    command, folder = sys.argv[1], Path(sys.argv[2])
    try:
        if command == "start":
            _start(folder)
        elif command == "serve":
            _serve(folder)
        else:
            _watch(folder, int(sys.argv[3]))
            os._exit(0)  # not by returning: the thread that reads commands never ends
    except UserError as e:
        print(e, file=sys.stderr)
        sys.exit(2)
