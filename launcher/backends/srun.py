"""The gang of a SLURM job: a step that srun starts, with a task for each process."""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, Any

from configs.clusters import SlurmCluster
from launcher.backends import slurm_commands as commands
from launcher.gang import Exit, drain
from launcher.host.process import HEARTBEAT_SECONDS, host_program
from launcher.host.task import INTERFACE
from launcher.machine.slurm import expand_range
from launcher.plan import Plan
from launcher.rundir import RunDirectory

SILENT_SECONDS = 20.0
START_SECONDS = 600.0  # the time in which images of containers are fetched
KILL_SECONDS = 3.0

# Messages of srun on a task and on a node that could not report by themselves.
_TASKS = re.compile(r"srun: error: (\S+): tasks? ([\d,\-]+): (.+)")
_NODE = re.compile(r"srun: error: .* failed on node (\S+): (.+)")
_SIGNALS = {signal.strsignal(s): s for s in signal.Signals}


def slurm_cluster(plan: Plan) -> SlurmCluster:
    """Settings of the cluster; the defaults in a job that the user submitted."""
    return SlurmCluster.model_validate(plan.submission or {"nodes": plan.hosts})


def flags(options: dict[str, str | int | bool], quote: Callable[[str], str] = str) -> list[str]:
    return [
        f"--{name}" if value is True else f"--{name}={quote(str(value))}"
        for name, value in options.items()
        if value is not False
    ]


def srun_command(plan: Plan, attempt: int) -> list[str]:
    cluster = slurm_cluster(plan)
    python = cluster.python or ("python3" if cluster.container else sys.executable)
    options: dict[str, str | int | bool] = {
        "nodes": plan.hosts,
        "ntasks": plan.processes,
        "ntasks-per-node": plan.processes // plan.hosts,
        # Since SLURM 22.05 srun does not take it from sbatch.
        "cpus-per-task": os.environ.get("SLURM_CPUS_PER_TASK", False),
        # A process may use all CPUs of its task, and the step need not wait for what remains of the last attempt.
        "cpu-bind": "none",
        "overlap": True,
        "distribution": "block",
        "export": "ALL",
        "mpi": "none",
        # The supervisor ends the step within a second; srun would wait for tasks that cannot end by themselves.
        "kill-on-bad-exit": "0",
        "wait": "0",
    }
    if cluster.container:
        mounts = [f"{plan.run_directory}:{plan.run_directory}", *cluster.container.mounts]
        options |= {"container-image": cluster.container.image, "container-mounts": ",".join(mounts)}
    return [
        "srun",
        *flags(options | cluster.srun),
        *host_program("task", plan.run_directory, str(attempt), python=python),
    ]


def _interface_environment(plan: Plan) -> dict[str, str]:
    interface = slurm_cluster(plan).interface
    return {INTERFACE: interface} if interface else {}


class SrunGang:
    """A step of this job with a task for each process, which runs launcher/host/task.py."""

    def __init__(self, plan: Plan, run: RunDirectory, attempt: int):
        self._nodes = [node for node in commands.job_nodes() for _ in range(plan.processes // plan.hosts)]
        self._running = set(range(plan.processes))
        self._begun = time.monotonic()
        self._heard: dict[int, float] = {}
        self._step: str | None = None
        self._killed: float | None = None
        self._polled = self._begun
        self._reports: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._last_message = ""
        self._log = (run.path / f"logs/attempt-{attempt}/srun.log").open("ab")
        self._srun = subprocess.Popen(
            srun_command(plan, attempt),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | _interface_environment(plan),
            start_new_session=True,
        )
        threading.Thread(target=self._wait, daemon=True).start()

    def poll(self, timeout: float) -> list[Exit]:
        exits = [e for report in drain(self._reports, timeout) for e in self._exits(report)]
        exits += self._silent(timeout)
        if self._killed and time.monotonic() - self._killed > KILL_SECONDS and self._srun.poll() is None:
            self._force()
        return exits

    def request_stop(self) -> None:
        self._send(b"stop\n")

    def kill(self) -> None:
        if self._killed is None:
            self._killed = time.monotonic()
            self._send(None)

    def detach(self) -> None:
        raise AssertionError("the gang ends with its launcher")

    def stopped_by(self) -> str:
        return commands.current_stop_cause()

    def _send(self, command: bytes | None) -> None:
        """Send a command to all hosts; None closes the channel, which ends their workers."""
        assert self._srun.stdin is not None
        try:
            if command is None:
                self._srun.stdin.close()
            else:
                self._srun.stdin.write(command)
                self._srun.stdin.flush()
        except (OSError, ValueError):  # srun has ended, or its standard input was closed before
            pass

    def _force(self) -> None:
        """End a host that does not read commands, or whose worker cannot be killed."""
        if self._step:
            commands.run("scancel", "--signal=KILL", self._step)
        self._srun.kill()

    # Threads

    def _wait(self) -> None:
        assert self._srun.stdout is not None
        assert self._srun.stderr is not None
        readers = [
            threading.Thread(target=self._read, args=(self._srun.stdout, self._on_host_line), daemon=True),
            threading.Thread(target=self._read, args=(self._srun.stderr, self._on_srun_line), daemon=True),
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        self._reports.put({"ended": self._srun.wait()})

    def _read(self, pipe: IO[bytes], parse: Callable[[str], bool]) -> None:
        """Log the lines that `parse` does not take for a report."""
        for line in pipe:
            if not parse(line.decode(errors="replace").strip()):
                self._log.write(line)
                self._log.flush()

    def _on_host_line(self, line: str) -> bool:
        try:
            report = json.loads(line)
        except ValueError:
            return False
        is_ours = isinstance(report, dict) and "process" in report
        if is_ours:
            self._reports.put(report)
        return is_ours

    def _on_srun_line(self, line: str) -> bool:
        self._last_message = line
        if match := _TASKS.match(line):
            for task in expand_range(match[2]):
                self._reports.put({"process": int(task), "exit": _code(match[3]), "error": ""})
        elif match := _NODE.match(line):
            for process, node in enumerate(self._nodes):
                if node == match[1]:
                    self._reports.put(
                        {"process": process, "exit": 1, "cause": "not started", "error": match[2]}
                    )
        return False

    # Exits, from reports and from silence

    def _exits(self, report: dict[str, Any]) -> list[Exit]:
        if "ended" in report:
            started = [p for p in self._running if p in self._heard]
            causes = {p: "" if p in started else "srun failed" for p in sorted(self._running)}
            return [
                self._exit(p, report["ended"] or 1, cause, self._last_message) for p, cause in causes.items()
            ]
        process = report["process"]
        if "host" in report:
            self._heard[process], self._step = time.monotonic(), report["step"]
            self._nodes[process] = report["host"]
        if "exit" not in report or process not in self._running:
            return []
        return [self._exit(process, report["exit"], report.get("cause", ""), report["error"])]

    def _exit(self, process: int, code: int, cause: str, error: str) -> Exit:
        self._running.discard(process)
        return Exit(process, code, self._nodes[process], cause, error)

    def _silent(self, timeout: float) -> list[Exit]:
        """The exit of the first process whose host has stopped reporting: it is cut off, or frozen."""
        now = time.monotonic()
        missed = now - self._polled - timeout
        self._polled = now
        if missed > HEARTBEAT_SECONDS:  # this process was frozen itself, as in a suspended job
            self._begun += missed
            self._heard = {process: heard + missed for process, heard in self._heard.items()}
        for process in sorted(self._running, key=lambda p: self._heard.get(p, self._begun)):
            heard = self._heard.get(process)
            silent = now - (heard or self._begun)
            if self._killed is None and silent > (SILENT_SECONDS if heard else START_SECONDS):
                error = f"nothing was heard of {self._nodes[process]} for {silent:.0f} s"
                return [self._exit(process, 1, "lost" if heard else "not started", error)]
        return []


def _code(words: str) -> int:
    """`Exited with exit code 3`, `Killed` and the like as an exit code, or minus the signal."""
    if match := re.search(r"exit code (\d+)", words):
        code = int(match[1])
        return code if code < 128 else 128 - code
    name = words.removesuffix(" (core dumped)")
    return -_SIGNALS[name] if name in _SIGNALS else 1
