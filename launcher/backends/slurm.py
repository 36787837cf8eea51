"""SLURM: `launch` submits a job; on its first node the job supervises the run, and starts attempts with srun.

What a job is asked of, and how it ends, is SLURM's to say: squeue, then sacct, then the run's own record.
"""

import json
import math
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import IO, Any

from configs.clusters import SlurmCluster, seconds
from configs.errors import UserError
from configs.files import write_atomically
from launcher.backends import Exit, State, drain, ended
from launcher.host import HEARTBEAT_SECONDS, INTERFACE
from launcher.place import hostnames, numbers
from launcher.plan import Plan
from launcher.rundir import RunDirectory

REMOTE = False
ASK_SECONDS = 30.0
SILENT_SECONDS = 20.0
START_SECONDS = 600.0  # images of containers are fetched then
KILL_SECONDS = 3.0
PATIENCE_SECONDS = 120.0
# SLURM may send the signal of --signal up to a minute early.
EARLY_SECONDS = 60.0
FAILURES_OF_A_BAD_NODE = 2

# srun's words on a task and on a node, whose host had no chance to say it itself.
_TASKS = re.compile(r"srun: error: (\S+): tasks? ([\d,\-]+): (.+)")
_NODE = re.compile(r"srun: error: .* failed on node (\S+): (.+)")
_SIGNALS = {signal.strsignal(s): s for s in signal.Signals}


# What is submitted


def render(plan: Plan) -> str:
    if plan.submission is None:
        return shlex.join(_srun(plan, attempt=1))
    cluster = SlurmCluster.model_validate(plan.submission)
    python = cluster.python if cluster.python and not cluster.container else sys.executable
    supervise = [python, "-P", "-m", "podlaunch", "supervise", "--", plan.run_directory]
    return "\n".join(
        [
            "#!/bin/bash",
            # sbatch reads quotes in its lines as a shell does.
            *(f"#SBATCH {flag}" for flag in _flags(_options(plan, cluster), quote=shlex.quote)),
            "",
            *cluster.setup,
            *(f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()),
            "# Starts and watches the workers on all nodes. Saved and not yet done, it requeues this job.",
            f"exec {shlex.join(supervise)}",
            "",
        ]
    )


def _options(plan: Plan, cluster: SlurmCluster) -> dict[str, str | int | bool]:
    tasks = cluster.tasks_per_node
    memory = cluster.memory_gib_per_task
    options: dict[str, str | int | bool | None] = {
        "job-name": plan.name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "time": cluster.time,
        "constraint": cluster.constraint,
        "nodes": cluster.nodes,
        "ntasks-per-node": tasks,
        "cpus-per-task": cluster.cpus_per_task,
        "mem": f"{math.ceil(1024 * memory * tasks)}M" if memory else None,
        "gres": cluster.gres,
        "gpus-per-node": None if "gpu" in (cluster.gres or "") else cluster.gpus_per_node or None,
        # To the steps, not to this script: the workers save at a common step.
        "signal": f"TERM@{round(60 * cluster.save_minutes)}",
        "requeue": "no-requeue" not in cluster.sbatch,
        "open-mode": "append",
    }
    return {name: value for name, value in (options | cluster.sbatch).items() if value is not None}


def _flags(options: dict[str, str | int | bool], quote: Callable[[str], str] = str) -> list[str]:
    return [
        f"--{name}" if value is True else f"--{name}={quote(str(value))}"
        for name, value in options.items()
        if value is not False
    ]


def submit(plan: Plan, run: RunDirectory) -> str:
    cluster = SlurmCluster.model_validate(plan.submission)
    if not shutil.which("sbatch"):
        raise UserError(
            f"cluster = {plan.cluster}: there is no sbatch on this machine; type this on a login node of the cluster"
        )
    if "\\" in str(run.path):
        raise UserError(f"{run.path}: SLURM cannot write to a path with a backslash; choose another --root")
    _check_partition(plan.cluster, cluster)
    logs, script = run.path / "logs", render(plan)
    logs.mkdir(exist_ok=True)
    # Not in the script, whose lines cannot hold each path.
    output = f"{logs}/slurm-".replace("%", "%%") + "%j.log"
    command = ["sbatch", "--parsable", f"--output={output}"]
    if excluded := run.excluded_nodes():
        asked = cluster.sbatch.get("exclude")
        command.append(f"--exclude={','.join([*excluded, *([str(asked)] if asked else [])])}")
    done = _ask(*command, text=script)
    if done.returncode:
        raise UserError(
            f"cluster = {plan.cluster}: SLURM refuses the job: {_words(done.stderr)}; "
            "mend the cluster's settings, or give others with --sbatch option=value"
        )
    write_atomically(run.path / "job.sbatch", script)
    return done.stdout.strip().partition(";")[0]


def _check_partition(name: str, cluster: SlurmCluster) -> None:
    """What sbatch would take and then never start. Raises UserError."""
    options = _ask("sinfo", "--noheader", "--format=%P|%D|%l|%L")
    partitions = [line.split("|") for line in options.stdout.splitlines()]
    default = cluster.partition or os.environ.get("SBATCH_PARTITION", "")
    asked = str(cluster.sbatch.get("partition", default)).split(",")
    chosen = [p for p in partitions if p[0].rstrip("*") in asked or (asked == [""] and p[0].endswith("*"))]
    if not chosen:
        return  # sbatch has the better words
    names = ", ".join(dict.fromkeys(p[0].rstrip("*") for p in chosen))
    counts: Counter[str] = Counter()
    for p in chosen:
        counts[p[0]] += int(p[1])
    most = max(counts.values())
    if cluster.nodes > most:
        raise UserError(
            f"cluster = {name}: {cluster.nodes} nodes, but partition {names} has {most}; ask for at most {most}"
        )
    limits = [limit for p in chosen if (limit := _limit(p[2]))]
    if cluster.time and limits and seconds(cluster.time) > max(limits):
        raise UserError(
            f"cluster = {name}: time = {cluster.time} is above the limit of partition {names}, "
            f"{', '.join(p[2] for p in chosen)}; the run goes on in the next job, so ask for less"
        )
    defaults = [limit for p in chosen if (limit := _limit(p[3]) or _limit(p[2]))]
    if not cluster.time and defaults and max(defaults) <= 60 * cluster.save_minutes:
        raise UserError(
            f"cluster = {name}: partition {names} gives a job {max(defaults) / 60:g} minutes, not above save_minutes = "
            f"{cluster.save_minutes:g}, those before the limit at which the run begins to save; set time, "
            "or lower save_minutes"
        )


def _limit(text: str) -> float | None:
    try:
        return seconds(text)
    except ValueError:  # n/a
        return None


# How a job stands


def state(run: RunDirectory) -> State:
    result, job = run.result(), run.job()
    if job is None or (result and result["status"] in ("completed", "failed", "stopped")):
        return ended(run)
    if not shutil.which("squeue"):
        return State("unknown", f"job {job}; there is no squeue on this machine")
    asked = _ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T|%r|%S|%B")
    if asked.returncode and "Invalid job id" not in asked.stderr:
        return State("unknown", f"job {job}; squeue does not answer: {_words(asked.stderr)}")
    if asked.returncode or not asked.stdout.strip():
        return _accounted(run, job)
    word, reason, start, host = asked.stdout.splitlines()[0].split("|")
    if word in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"):
        why = "" if reason == "None" else f", {reason}"
        when = "" if start == "N/A" else f", expected to start at {start}"
        return State("queued", f"job {job}{why}{when}")
    if word in ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING"):
        return State("running", "" if word == "RUNNING" else f"job {job}, {word}")
    return _finished(run, job, word, f"{word}, {reason}, on {host}")


def _accounted(run: RunDirectory, job: str) -> State:
    """Of a job that squeue has forgotten."""
    try:
        asked = _ask("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", "--format=State")
    except UserError:
        return ended(run)
    if asked.returncode or not asked.stdout.strip():  # no accounting here
        return ended(run)
    word = asked.stdout.splitlines()[0]  # "CANCELLED by 1000"
    return _finished(run, job, word, word)


def _finished(run: RunDirectory, job: str, word: str, words: str) -> State:
    own = ended(run)
    if own.word not in ("interrupted", "preempted"):
        return own
    if word.startswith("CANCELLED"):
        return State("stopped", f"job {job} was cancelled")
    if own.word == "preempted":
        return own
    if run.last_attempt() == 0:
        words += f"; was {run.path} visible there?"
    return State("interrupted", f"job {job} is {words}")


def cancel(run: RunDirectory) -> None:
    done = _ask("scancel", run.job() or "")
    if done.returncode:
        raise UserError(f"job {run.job()} of run {run.name} cannot be cancelled: {_words(done.stderr)}")


# In the job


def check(plan: Plan) -> None:
    """Raises UserError where this job would be over before it could save."""
    if "SLURM_JOB_ID" not in os.environ:
        raise UserError(
            "this is no SLURM job: `launch supervise` belongs into a batch script; type `launch CONFIG`"
        )
    limit, lead = _time("%l"), 60 * _cluster(plan).save_minutes
    if limit <= lead:
        raise UserError(
            f"the time limit of job {_job()} is {limit / 60:g} minutes, not above the {lead / 60:g} before its end at "
            "which the run begins to save; give it more time"
        )


def ledger() -> dict[str, Any]:
    job, count = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", 0)
    return {"job": job, "restart_count": int(count) if job else None}


def can_restart(plan: Plan, run: RunDirectory) -> bool:
    """Not without time to train and save, nor on a node that failed twice."""
    failures = [a["failure"] for a in run.attempts_of_launch() if a["failure"]]
    # An exit code is the program's own; what kills it, or keeps it from starting, may be the node's.
    counts = Counter(f["host"] for f in failures if not f["cause"].startswith(("exit code", "srun")))
    bad = [host for host, count in counts.items() if count >= FAILURES_OF_A_BAD_NODE]
    run.exclude_nodes(bad)
    here = set(_nodes()) & set(bad)
    return not here and _time("%L") > 60 * _cluster(plan).save_minutes + 2 * EARLY_SECONDS


def go_on_later(plan: Plan, run: RunDirectory) -> str:
    """Have SLURM run this job's script again; what it did, in words."""
    job, fields = _job(), _fields(patience_seconds=PATIENCE_SECONDS)
    if not fields:
        return f"SLURM does not answer, so job {job} is not requeued; type `launch` again"
    if fields.get("BatchFlag") != "1":
        return f"job {job} has no script to requeue; type `launch` again"
    if _restarted(fields):
        done = f"SLURM has requeued job {job}"
    elif fields.get("Requeue") == "1":
        asked = _ask_patiently("scontrol", "requeue", job)
        if asked.returncode:
            return f"job {job} cannot be requeued: {_words(asked.stderr)}; type `launch` again"
        done = f"job {job} is requeued"
    elif plan.submission is None:
        return f"job {job} may not be requeued; submit it again"
    else:
        run.write_job(submit(plan, run))
        return f"job {job} may not be requeued; job {run.job()} is submitted in its place"
    excluded = run.excluded_nodes()
    if excluded:
        before = fields.get("ExcNodeList", "(null)")
        nodes = sorted({*excluded, *([] if before == "(null)" else hostnames(before))})
        asked = _ask_patiently("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}")
        done += f", without {', '.join(excluded)}" if not asked.returncode else f" ({_words(asked.stderr)})"
    return done


def stay_ended() -> None:
    if _restarted(_fields()):
        _ask("scancel", _job())


def start(plan: Plan, run: RunDirectory, attempt: int) -> "SrunGang":
    return SrunGang(plan, run, attempt)


def adopt(plan: Plan, run: RunDirectory, attempt: int) -> None:
    """A step ends with the job's launcher."""


def _cluster(plan: Plan) -> SlurmCluster:
    """What was asked for; where the job was made by other hands, the defaults."""
    return SlurmCluster.model_validate(plan.submission or {"nodes": plan.hosts})


def _srun(plan: Plan, attempt: int) -> list[str]:
    cluster = _cluster(plan)
    python = cluster.python or ("python3" if cluster.container else sys.executable)
    options: dict[str, str | int | bool] = {
        "nodes": plan.hosts,
        "ntasks": plan.processes,
        "ntasks-per-node": plan.processes // plan.hosts,
        # Not handed on by sbatch since SLURM 22.05.
        "cpus-per-task": os.environ.get("SLURM_CPUS_PER_TASK", False),
        # A process may use all CPUs of its task; what is left of the attempt before is no reason to wait.
        "cpu-bind": "none",
        "overlap": True,
        "distribution": "block",
        "export": "ALL",
        "mpi": "none",
        # Ours to do, in a second: srun would first wait for what cannot end by itself.
        "kill-on-bad-exit": "0",
        "wait": "0",
    }
    if cluster.container:
        mounts = [f"{plan.run_directory}:{plan.run_directory}", *cluster.container.mounts]
        options |= {"container-image": cluster.container.image, "container-mounts": ",".join(mounts)}
    return [
        "srun",
        *_flags(options | cluster.srun),
        python,
        "-P",
        "-m",
        "podlaunch.host",
        "task",
        plan.run_directory,
        str(attempt),
    ]


def _interface(plan: Plan) -> dict[str, str]:
    interface = _cluster(plan).interface
    return {INTERFACE: interface} if interface else {}


class SrunGang:
    """A step of this job: a task a process, each with a launcher.host that tells how its worker does."""

    def __init__(self, plan: Plan, run: RunDirectory, attempt: int):
        self._nodes = [node for node in _nodes() for _ in range(plan.processes // plan.hosts)]
        self._running = set(range(plan.processes))
        self._begun = time.monotonic()
        self._heard: dict[int, float] = {}
        self._step: str | None = None
        self._killed: float | None = None
        self._polled = self._begun
        self._news: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._last_words = ""
        self._log = (run.path / f"logs/attempt-{attempt}/srun.log").open("ab")
        self._srun = subprocess.Popen(
            _srun(plan, attempt),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | _interface(plan),
            start_new_session=True,
        )
        threading.Thread(target=self._wait, daemon=True).start()

    def poll(self, timeout: float) -> list[Exit]:
        exits = [e for news in drain(self._news, timeout) for e in self._exits(news)]
        exits += self._silent(timeout)
        if self._killed and time.monotonic() - self._killed > KILL_SECONDS and self._srun.poll() is None:
            self._force()
        return exits

    def ask_to_stop(self) -> None:
        self._tell(b"stop\n")

    def kill(self) -> None:
        if self._killed is None:
            self._killed = time.monotonic()
            self._tell(None)

    def leave(self) -> None:
        raise AssertionError("it ends with its launcher")

    def stopped_by(self) -> str:
        return stopped_by(_fields(), os.environ)

    def _tell(self, words: bytes | None) -> None:
        """To all hosts; None ends them."""
        assert self._srun.stdin is not None
        try:
            if words is None:
                self._srun.stdin.close()
            else:
                self._srun.stdin.write(words)
                self._srun.stdin.flush()
        except (OSError, ValueError):  # srun has ended, or was told to
            pass

    def _force(self) -> None:
        """A host that does not hear us, or whose worker cannot be killed."""
        if self._step:
            _ask("scancel", "--signal=KILL", self._step)
        self._srun.kill()

    # Threads

    def _wait(self) -> None:
        assert self._srun.stdout is not None
        assert self._srun.stderr is not None
        readers = [
            threading.Thread(target=self._read, args=(self._srun.stdout, self._host_says), daemon=True),
            threading.Thread(target=self._read, args=(self._srun.stderr, self._srun_says), daemon=True),
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        self._news.put({"ended": self._srun.wait()})

    def _read(self, pipe: IO[bytes], understand: Any) -> None:
        for line in pipe:
            if not understand(line.decode(errors="replace").strip()):
                self._log.write(line)
                self._log.flush()

    def _host_says(self, line: str) -> bool:
        try:
            news = json.loads(line)
        except ValueError:
            return False
        is_ours = isinstance(news, dict) and "process" in news
        if is_ours:
            self._news.put(news)
        return is_ours

    def _srun_says(self, line: str) -> bool:
        self._last_words = line
        if match := _TASKS.match(line):
            for task in numbers(match[2]):
                self._news.put({"process": int(task), "exit": _code(match[3]), "error": ""})
        elif match := _NODE.match(line):
            for process, node in enumerate(self._nodes):
                if node == match[1]:
                    self._news.put({"process": process, "exit": 1, "cause": "not started", "error": match[2]})
        return False

    # What follows from what was heard

    def _exits(self, news: dict[str, Any]) -> list[Exit]:
        if "ended" in news:
            started = [p for p in self._running if p in self._heard]
            causes = {p: "" if p in started else "srun failed" for p in sorted(self._running)}
            return [self._exit(p, news["ended"] or 1, cause, self._last_words) for p, cause in causes.items()]
        process = news["process"]
        if "host" in news:
            self._heard[process], self._step = time.monotonic(), news["step"]
            self._nodes[process] = news["host"]
        if "exit" not in news or process not in self._running:
            return []
        return [self._exit(process, news["exit"], news.get("cause", ""), news["error"])]

    def _exit(self, process: int, code: int, cause: str, error: str) -> Exit:
        self._running.discard(process)
        return Exit(process, code, self._nodes[process], cause, error)

    def _silent(self, timeout: float) -> list[Exit]:
        """The first process whose host is not heard any more: cut off, or frozen."""
        now = time.monotonic()
        missed = now - self._polled - timeout
        self._polled = now
        if missed > HEARTBEAT_SECONDS:  # we were frozen ourselves, as in a suspended job
            self._begun += missed
            self._heard = {process: heard + missed for process, heard in self._heard.items()}
        for process in sorted(self._running, key=lambda p: self._heard.get(p, self._begun)):
            heard = self._heard.get(process)
            silent = now - (heard or self._begun)
            if self._killed is None and silent > (SILENT_SECONDS if heard else START_SECONDS):
                error = f"nothing was heard of {self._nodes[process]} for {silent:.0f} s"
                return [self._exit(process, 1, "lost" if heard else "not started", error)]
        return []


def stopped_by_now() -> str:
    """Who ends the step that others have started."""
    return stopped_by(_fields(), os.environ)


# Asking SLURM


def _job() -> str:
    return os.environ["SLURM_JOB_ID"]


def _nodes() -> list[str]:
    return hostnames(os.environ["SLURM_JOB_NODELIST"])


def _time(field: str) -> float:
    """`%l`, the time limit of this job, or `%L`, what is left of it, in seconds; infinite where unknown."""
    limit = _limit(_ask("squeue", "--noheader", f"--jobs={_job()}", f"--format={field}").stdout.strip())
    return math.inf if limit is None else limit


def _fields(patience_seconds: float = 0.0) -> dict[str, str]:
    """What `scontrol show job` says of this job; nothing where it cannot be asked, as in a container."""
    if not shutil.which("scontrol"):
        return {}
    command = ["scontrol", "--oneliner", "show", "job", _job()]
    text = _ask_patiently(*command, patience_seconds=patience_seconds).stdout
    return dict(reversed(re.findall(r"(\w+)=(\S*)", text)))  # a comment at the end may say anything


def _restarted(fields: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the job was requeued since it began."""
    return int(fields.get("Restarts", 0)) > int(environment.get("SLURM_RESTART_COUNT", 0))


def stopped_by(fields: Mapping[str, str], environment: Mapping[str, str]) -> str:
    """Whether a user cancelled the job. Of a job that is ending, SLURM tells only what it is not."""
    is_ending = fields.get("JobState") in ("COMPLETING", "CANCELLED")
    is_over = seconds(fields.get("RunTime", "0")) >= seconds(fields.get("TimeLimit", "UNLIMITED"))
    is_preempted = _restarted(fields, environment) or fields.get("PreemptTime", "None") != "None"
    has_lost_nodes = fields.get("Reason") in ("NodeDown", "PartitionDown")
    return "preempted" if not is_ending or is_over or is_preempted or has_lost_nodes else "stopped"


def _code(words: str) -> int:
    """`Exited with exit code 3`, `Killed`, … as an exit code, or minus the signal."""
    if match := re.search(r"exit code (\d+)", words):
        code = int(match[1])
        return code if code < 128 else 128 - code
    name = words.removesuffix(" (core dumped)")
    return -_SIGNALS[name] if name in _SIGNALS else 1


def _ask(*command: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, input=text, stdin=None if text else subprocess.DEVNULL, capture_output=True, text=True
        )
    except FileNotFoundError:
        raise UserError(f"there is no {command[0]} on this machine; type this where SLURM is") from None


def _ask_patiently(
    *command: str, patience_seconds: float = PATIENCE_SECONDS
) -> subprocess.CompletedProcess[str]:
    """Again while the controller cannot be reached: it may be restarting."""
    deadline = time.monotonic() + patience_seconds
    while True:
        done = _ask(*command)
        out_of_reach = done.returncode and re.search(r"contact|connect|timed out", done.stderr, re.IGNORECASE)
        if not out_of_reach or time.monotonic() > deadline:
            return done
        time.sleep(2.0)


def _words(stderr: str) -> str:
    """SLURM's own, in one line."""
    lines = [re.sub(r"^\w+: (error: )?", "", line) for line in stderr.strip().splitlines()]
    return "; ".join(lines) or "it does not say why"
