"""The gang of a SLURM job: a step that srun starts, with a task for each process."""

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

from configs.clusters import SlurmCluster
from launcher.backends import slurm_commands as commands
from launcher.gang import EXIT_USER_ERROR, OUT_OF_MEMORY, STEP_FAILED, Exit, drain
from launcher.host.process import HEARTBEAT_SECONDS, host_program
from launcher.host.task import INTERFACE
from launcher.machine.slurm import expand_range, step_environment
from launcher.plan import Plan
from launcher.rundir import RunDirectory

# Six heartbeats and more: a node that is only busy, or a network that stalls for a moment, is not given up.
SILENT_SECONDS = 20.0
START_SECONDS = 600.0  # includes the time in which images of containers are fetched
REACH_SECONDS = 450.0  # controllers are back by then; below START_SECONDS, after which a node is blamed
KILL_SECONDS = 3.0  # srun and its tasks get that long to end by themselves

# Messages of srun on a task and on a node that could not report by themselves.
_TASKS = re.compile(r"srun: error: (\S+): tasks? ([\d,\-]+): (.+)")
_NODE = re.compile(r"srun: error: .* failed on node (\S+): (.+)")
# What srun says of itself. Its hints and the messages of plugins, which follow, are not the cause.
_ERROR = re.compile(r"srun: (error:|fatal:|unrecognized|invalid|option) .+")
# The controller does not answer, or has just begun to.
_NOT_YET = re.compile(r"contact|connect|timed out|zero bytes|nodes are busy|temporarily", re.IGNORECASE)
# It would say that again.
_MISTAKE = re.compile(r"srun: (?!error:)")
_OUT_OF_MEMORY = "Out Of Memory"
_SIGNALS = {signal.strsignal(s): s for s in signal.Signals} | {_OUT_OF_MEMORY: signal.SIGKILL}

Options = Mapping[str, str | int | bool | None]
"""Options of srun or sbatch, by their long names; True is an option without a value."""


def slurm_cluster(plan: Plan) -> SlurmCluster:
    """Settings of the cluster; the defaults in a job that the user submitted."""
    return SlurmCluster.model_validate(plan.submission or {"nodes": plan.hosts})


def flags(options: Options) -> list[str]:
    """The options as a command line takes them; those that are None or False are left out."""
    return [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in options.items()
        if value is not None and value is not False
    ]


def srun_command(plan: Plan, attempt: int) -> list[str]:
    cluster = slurm_cluster(plan)
    python = cluster.python or ("python3" if cluster.container else sys.executable)
    options = {
        "nodes": plan.hosts,
        "ntasks": plan.processes,
        "ntasks-per-node": plan.processes // plan.hosts,
        # Since SLURM 22.05 srun does not take it from sbatch.
        "cpus-per-task": os.environ.get("SLURM_CPUS_PER_TASK"),
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
    task = host_program("task", plan.run_directory, str(attempt), python=python)
    return ["srun", *flags(options | cluster.srun), *task]


class SrunGang:
    """A step of this job with a task for each process, which runs launcher/host/task.py."""

    def __init__(self, plan: Plan, run: RunDirectory, attempt: int):
        self._nodes = [node for node in commands.job_nodes() for _ in range(plan.processes // plan.hosts)]
        self._running = set(range(plan.processes))
        self._started = self._polled = time.monotonic()
        self._killed: float | None = None
        self._last_heard: dict[int, float] = {}
        """When each process reported last; it is absent before its first report."""
        self._has_lost_node = False
        self._step: str | None = None
        """JOB.STEP, which the first report names."""
        self._reports: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._error = ""
        """What srun said first of its own failure; what it says later are hints, or follows from it."""
        self._has_begun = self._stopping = False
        self._log = (run.path / f"logs/attempt-{attempt}/srun.log").open("ab")
        self._command = srun_command(plan, attempt)
        interface = slurm_cluster(plan).interface
        self._environment = step_environment() | ({INTERFACE: interface} if interface else {})
        self._srun = self._start()
        threading.Thread(target=self._wait, daemon=True).start()

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        srun, *arguments = self._command
        return subprocess.Popen(
            [srun, *options, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self._environment,
            start_new_session=True,  # so that Ctrl-C reaches the launcher alone
        )

    def poll(self, timeout: float) -> list[Exit]:
        exits = [e for report in drain(self._reports, timeout) for e in self._exits(report)]
        exits += self._silent(timeout)
        if self._killed and time.monotonic() - self._killed > KILL_SECONDS and self._srun.poll() is None:
            self._force()
        return exits

    def request_stop(self) -> None:
        self._stopping = True
        self._send(b"stop\n")

    def kill(self) -> None:
        if self._killed is None:
            self._killed = time.monotonic()
            self._send(None)
            if self._has_lost_node:
                # srun would wait for that node, outlive this job, and then kill the step of its number: once the job
                # is requeued, that is a step of the new allocation.
                self._force()

    detach = kill  # the step cannot go on without the launcher

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
        # The whole group: srun has a helper process, which kills the step when srun is killed.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._srun.pid, signal.SIGKILL)
        self._srun.wait()

    # Threads

    def _wait(self) -> None:
        code = self._run_srun()
        # A controller that is restarted is no failure of this run, and srun waits for it only briefly.
        while code and self._may_yet_start():
            if self._stopping:
                code = -signal.SIGTERM  # as of a worker that has not begun to train
                break
            time.sleep(commands.RETRY_SECONDS)
            if self._killed is not None:
                break
            self._error = ""
            # Right after its start the controller knows no nodes yet, and would keep srun waiting for minutes.
            self._srun = self._start("--immediate=4")
            if self._stopping:  # the request may have gone to the srun before, which has ended
                self._send(b"stop\n")
            code = self._run_srun()
        self._reports.put({"ended": code})

    def _may_yet_start(self) -> bool:
        """Whether srun started nothing because the controller is down, which a site restarts within minutes."""
        has_time = self._killed is None and time.monotonic() - self._started < REACH_SECONDS
        return has_time and not self._has_begun and bool(_NOT_YET.search(self._error))

    def _run_srun(self) -> int:
        """Read both pipes to their ends, so that all reports come before the end of srun itself."""
        pipes = [(self._srun.stdout, self._on_task_line), (self._srun.stderr, self._on_srun_line)]
        readers = [threading.Thread(target=self._read, args=pipe, daemon=True) for pipe in pipes]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        return self._srun.wait()

    def _read(self, pipe: IO[bytes], parse: Callable[[str], bool]) -> None:
        """Log the lines that `parse` does not take for a report."""
        for line in pipe:
            if not parse(line.decode(errors="replace").strip()):
                self._log.write(line)
                self._log.flush()

    def _on_task_line(self, line: str) -> bool:
        try:
            report = json.loads(line)
        except ValueError:  # a container, or a shell of the site, may print as well
            return False
        is_ours = isinstance(report, dict) and "process" in report
        if is_ours:
            self._has_begun = True
            self._reports.put(report)
        return is_ours

    def _on_srun_line(self, line: str) -> bool:
        """srun tells of tasks and nodes that cannot report any more. All its lines are logged."""
        if match := _TASKS.match(line):
            is_memory = match[3] == _OUT_OF_MEMORY
            cause, error = (OUT_OF_MEMORY, "the kernel ended it on its node") if is_memory else ("", "")
            for task in expand_range(match[2]):
                report = {"process": int(task), "exit": _code(match[3]), "cause": cause, "error": error}
                self._reports.put(report)
        elif match := _NODE.match(line):
            failure = {"exit": 1, "cause": "not started", "error": match[2]}
            for process, node in enumerate(self._nodes):
                if node == match[1]:
                    self._has_begun = self._has_lost_node = True
                    self._reports.put({"process": process, **failure})
        elif _ERROR.match(line) and not self._error:
            self._error = line
        return False

    # Exits, from reports and from silence

    def _exits(self, report: dict[str, Any]) -> list[Exit]:
        if "ended" in report:
            code = report["ended"] or 1  # srun may succeed although a task has not reported its end
            code = EXIT_USER_ERROR if _MISTAKE.match(self._error) else code
            causes = {p: "" if p in self._last_heard else STEP_FAILED for p in sorted(self._running)}
            error = self._error or "it gives no reason; see srun.log"
            return [self._exit(p, code, cause, error) for p, cause in causes.items()]
        process = report["process"]
        if "host" in report:
            self._last_heard[process], self._step = time.monotonic(), report["step"]
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
            self._started += missed
            self._last_heard = {process: heard + missed for process, heard in self._last_heard.items()}
        if self._killed is not None:
            return []
        for process in sorted(self._running, key=lambda p: self._last_heard.get(p, self._started)):
            has_started = process in self._last_heard
            silent = now - self._last_heard.get(process, self._started)
            if silent > (SILENT_SECONDS if has_started else START_SECONDS):
                self._has_lost_node = True
                error = f"nothing was heard of {self._nodes[process]} for {silent:.0f} s"
                return [self._exit(process, 1, "lost" if has_started else "not started", error)]
        return []


def _code(message: str) -> int:
    """`Exited with exit code 3`, `Killed` and the like as an exit code, or minus the signal."""
    if match := re.search(r"exit code (\d+)", message):
        code = int(match[1])
        return code if code < 128 else 128 - code  # a shell gives 128 + N for signal N
    name = message.removesuffix(" (core dumped)")
    return -_SIGNALS[name] if name in _SIGNALS else 1
