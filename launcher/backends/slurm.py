"""SLURM: `launch` submits a job, which supervises the run on its first node and starts attempts with srun.

The state of a job is what squeue says, then sacct, then the run's own record.
"""

import math
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from configs.clusters import SlurmCluster, seconds
from configs.errors import UserError
from configs.files import write_atomically
from launcher.backends import slurm_commands as commands
from launcher.backends.srun import SrunGang, flags, slurm_cluster, srun_command
from launcher.gang import OUT_OF_MEMORY, STEP_FAILED, State, recorded_state
from launcher.machine.slurm import check_job, ignored_variables, job_id
from launcher.plan import Plan
from launcher.rundir import RunDirectory

REMOTE = False
POLL_SECONDS = 30.0
# SLURM may send the signal of --signal up to a minute early.
EARLY_SIGNAL_SECONDS = 60.0
# Once may be chance. More would cost as many restarts.
BAD_NODE_FAILURES = 2
LOG_LINES = 5


# What is submitted


def render(plan: Plan) -> str:
    if plan.submission is None:
        return shlex.join(srun_command(plan, attempt=1))
    return f"{shlex.join(sbatch_command(plan))}\n\n{script(plan)}"


def sbatch_command(plan: Plan, excluded_nodes: Sequence[str] = ()) -> list[str]:
    """All options are here, since sbatch ranks variables of the user's shell above the lines of a script."""
    cluster = SlurmCluster.model_validate(plan.submission)
    options = _options(plan, cluster)
    if excluded_nodes:
        users = options.get("exclude")
        options |= {"exclude": ",".join([*excluded_nodes, *([str(users)] if users else [])])}
    return ["sbatch", "--parsable", *flags(options), _script_file(plan.run_directory)]


def script(plan: Plan) -> str:
    cluster = SlurmCluster.model_validate(plan.submission)
    python = cluster.python if cluster.python and not cluster.container else sys.executable
    supervise = [python, "-P", "-m", "podlaunch", "supervise", "--", plan.run_directory]
    return "\n".join(
        [
            "#!/bin/bash",
            *cluster.setup,
            *(f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()),
            "# Starts and watches the workers on all nodes, and requeues this job if the run is saved and not yet done.",
            f"exec {shlex.join(supervise)}",
            "",
        ]
    )


def _script_file(run_directory: str) -> str:
    """The script of a job, by whose path squeue knows the job, too."""
    return f"{run_directory}/job.sbatch"


def _options(plan: Plan, cluster: SlurmCluster) -> dict[str, Any]:
    tasks = cluster.tasks_per_node
    memory = cluster.memory_gib_per_task
    return {
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
        # The signal goes to the steps, not to this script, so that the workers save at a common step.
        "signal": f"TERM@{round(60 * cluster.save_minutes)}",
        "requeue": "no-requeue" not in cluster.sbatch,
        "output": f"{plan.run_directory}/logs/slurm-".replace("%", "%%") + "%j.log",
        "open-mode": "append",  # a requeued job continues the log
        **cluster.sbatch,
    }


def submit(plan: Plan, run: RunDirectory) -> str:
    cluster = SlurmCluster.model_validate(plan.submission)
    if not shutil.which("sbatch"):
        reason = "there is no sbatch on this machine"
        raise UserError(f"cluster = {plan.cluster}: {reason}; type this on a login node of the cluster")
    # sbatch takes a backslash in --output for an escape.
    if "\\" in str(run.path):
        raise UserError(f"{run.path}: SLURM cannot write to a path with a backslash; choose another --root")
    _check_partition(plan.cluster, cluster)
    (run.path / "logs").mkdir(exist_ok=True)
    write_atomically(run.path / "job.sbatch", script(plan))
    done = commands.run(*sbatch_command(plan, run.job.excluded_nodes()))
    if done.returncode:
        raise UserError(
            f"cluster = {plan.cluster}: SLURM refuses the job: {commands.message(done.stderr)}; "
            "correct the cluster's settings, or override them with --sbatch option=value"
        )
    job = commands.submitted_id(done.stdout) or _find_job(run)
    if job is None:
        raise UserError(
            f"sbatch on this machine names no job: {done.stdout.strip() or 'it prints nothing'}; "
            "type this where sbatch is SLURM's own"
        )
    return job


def ignored() -> str:
    """What the user may have meant for sbatch, which does not get it, in a sentence; empty where there is nothing."""
    names = ", ".join(ignored_variables())
    if not names:
        return ""
    return f"{names} of your environment: say what you need with --sbatch option=value, or in clusters.yaml"


def _job(run: RunDirectory) -> str | None:
    """The id of the job of a run; it is noted where a launcher was killed before it could."""
    job = run.job.id()
    if job is None and (job := _find_job(run)):
        with suppress(UserError):  # another user may look, but not write
            run.job.write_id(job)
    return job


def _find_job(run: RunDirectory) -> str | None:
    """The job that was submitted with the script of a run; None where there is none."""
    file = Path(_script_file(str(run.path.absolute())))  # as in the plan, by which it was submitted
    if not file.exists() or not shutil.which("squeue"):
        return None
    done = commands.run("squeue", "--noheader", f"--user={file.stat().st_uid}", "--format=%i %o")
    jobs = [line.split(" ", 1) for line in done.stdout.splitlines()]
    return next((job for job, command in jobs if command.strip() == str(file)), None)


def _check_partition(name: str, cluster: SlurmCluster) -> None:
    """Raises UserError for a job that sbatch would accept and SLURM never start."""
    lines = commands.run("sinfo", "--noheader", "--format=%P|%D|%l|%L|%s").stdout.splitlines()
    wanted = str(cluster.sbatch.get("partition", cluster.partition or "")).split(",")
    rows = [line.split("|") for line in lines]
    if wanted == [""]:
        rows = [row for row in rows if row[0].endswith("*")]  # the site's default partition
    else:
        rows = [row for row in rows if row[0].rstrip("*") in wanted]
    if not rows:
        return  # sbatch explains it better
    partitions, nodes, limits, defaults, sizes = zip(*rows, strict=True)
    names = ", ".join(dict.fromkeys(partition.rstrip("*") for partition in partitions))
    # A partition with unequal nodes has several lines.
    counts: Counter[str] = Counter()
    for partition, count in zip(partitions, nodes, strict=True):
        counts[partition] += int(count)
    num_nodes = max(counts.values())
    if cluster.nodes > num_nodes:
        raise UserError(
            f"cluster = {name}: {cluster.nodes} nodes, but partition {names} has {num_nodes}; ask for at most {num_nodes}"
        )
    # `1-infinite`, `1-8` or `1`
    largest = [size.rpartition("-")[2] for size in sizes]
    if all(size.isdecimal() and cluster.nodes > int(size) for size in largest):
        raise UserError(
            f"cluster = {name}: {cluster.nodes} nodes, but a job of partition {names} may have {', '.join(largest)}; "
            "ask for that at most"
        )
    limit = max(map(commands.limit_seconds, limits))
    if cluster.time and seconds(cluster.time) > limit:
        raise UserError(
            f"cluster = {name}: time = {cluster.time} is above the limit of partition {names}, {', '.join(limits)}; "
            "set a lower time: the run continues in the next job"
        )
    default_limit = min(limit, max(map(commands.limit_seconds, defaults)))
    if not cluster.time and default_limit <= 60 * cluster.save_minutes:
        raise UserError(
            f"cluster = {name}: partition {names} gives a job {default_limit / 60:g} minutes, not above save_minutes = "
            f"{cluster.save_minutes:g}, the minutes before the limit at which the run begins to save; set time, "
            "or lower save_minutes"
        )


# How a job stands


def state(run: RunDirectory) -> State:
    result = run.result()
    if result and result["status"] in ("completed", "failed", "stopped"):
        return recorded_state(run)
    job = _job(run)
    if job is None:
        return recorded_state(run)
    if not shutil.which("squeue"):
        return State("unknown", f"job {job}; there is no squeue on this machine")
    done = commands.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T|%r|%S|%B")
    if done.returncode and "Invalid job id" not in done.stderr:
        return State("unknown", f"job {job}; squeue does not answer: {commands.message(done.stderr)}")
    if done.returncode or not done.stdout.strip():
        return _state_from_sacct(run, job)
    status, reason, start, host = done.stdout.splitlines()[0].split("|")
    if status in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"):
        why = "" if reason == "None" else f", {reason}"
        when = "" if start == "N/A" else f", expected to start at {start}"
        return State("queued", f"job {job}{why}{when}")
    if status in ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "STAGE_OUT", "SIGNALING"):
        return State("running", "" if status == "RUNNING" else f"job {job}, {status}")
    return _final_state(run, job, status, f"{status}, {reason}, on {host}")


def _state_from_sacct(run: RunDirectory, job: str) -> State:
    """The state of a job that squeue has forgotten."""
    if not shutil.which("sacct"):
        return recorded_state(run)
    options = ("--noheader", "--parsable2", "--allocations", "--format=State")
    done = commands.run("sacct", *options, f"--jobs={job}")
    if done.returncode or not done.stdout.strip():  # this cluster has no accounting
        return recorded_state(run)
    status = done.stdout.splitlines()[0]  # such as "CANCELLED by 1000"
    return _final_state(run, job, status, status)


def _final_state(run: RunDirectory, job: str, status: str, description: str) -> State:
    """The state of a run whose job has ended: what the run recorded, or else what SLURM says of the job."""
    recorded = recorded_state(run)
    if recorded.status not in ("interrupted", "preempted"):
        return recorded
    if status.startswith("CANCELLED"):
        return State("stopped", f"job {job} was cancelled")
    if recorded.status == "preempted":
        return recorded
    lines = _last_words(run, job)
    return State("interrupted", f"job {job} is {description}{_explanation(run, status, lines)}", lines=lines)


def _explanation(run: RunDirectory, status: str, lines: Sequence[str]) -> str:
    """Why a job may have ended without a result, as a phrase; `lines`: of its log, which is in the run directory."""
    if status.startswith("OUT_OF_MEMORY"):
        return "; it ran out of memory: raise memory_gib_per_task"
    if os.statvfs(run.path).f_bavail == 0:
        return f"; the disk of {run.path} is full: make room there"
    return "" if lines or run.attempts.last() else f"; check that {run.path} is visible there"


def _last_words(run: RunDirectory, job: str) -> tuple[str, ...]:
    """The last lines of the log of a job."""
    text = run.read_tail(f"logs/slurm-{job}.log")
    return tuple(line for line in text.splitlines() if line.strip())[-LOG_LINES:]


def cancel(run: RunDirectory) -> None:
    job = _job(run) or ""
    done = commands.run("scancel", job)
    if done.returncode:
        raise UserError(f"job {job} of run {run.name} cannot be cancelled: {commands.message(done.stderr)}")


# In the job


def check(plan: Plan) -> None:
    """Raises UserError where this job would be over before it could save."""
    if "SLURM_JOB_ID" not in os.environ:
        raise UserError("this is no SLURM job: `launch supervise` is for batch scripts; type `launch CONFIG`")
    check_job()
    limit_minutes, save_minutes = commands.job_seconds("%l") / 60, slurm_cluster(plan).save_minutes
    if limit_minutes <= save_minutes:
        raise UserError(
            f"the time limit of job {job_id()} is {limit_minutes:g} minutes, not above the {save_minutes:g} "
            "before its end at which the run begins to save; raise the time limit"
        )


def job_info() -> dict[str, Any]:
    if "SLURM_JOB_ID" not in os.environ:
        return {"job": None, "restart_count": None}
    return {"job": job_id(), "restart_count": int(os.environ.get("SLURM_RESTART_COUNT", 0))}


def can_restart(plan: Plan, run: RunDirectory) -> bool:
    """Whether there is time to train and save, on nodes of which none failed twice."""
    failures = [a["failure"] for a in run.attempts.of_launch() if a["failure"]]
    # An exit code, or its need of memory, is the program's own doing. A signal, or a start that failed, may be the node's.
    counts = Counter(
        f["host"] for f in failures if not f["cause"].startswith(("exit code", STEP_FAILED, OUT_OF_MEMORY))
    )
    bad_nodes = [host for host, count in counts.items() if count >= BAD_NODE_FAILURES]
    can_exclude = bool(bad_nodes) and _can_exclude(plan, bad_nodes)
    run.job.write_bad_nodes(bad_nodes, exclude=can_exclude)
    if can_exclude and set(commands.job_nodes()) & set(bad_nodes):
        return False
    # A minute to train, before the minute in which SLURM may already signal.
    return commands.job_seconds("%L") > 60 * slurm_cluster(plan).save_minutes + 2 * EARLY_SIGNAL_SECONDS


def _can_exclude(plan: Plan, nodes: list[str]) -> bool:
    """Whether this job could run without these nodes: else it would wait in the queue for ever."""
    fields = commands.job_fields()
    if fields.get("BatchFlag") == "0":  # of salloc, which nobody can requeue
        return False
    if set(nodes) & set(commands.node_list(fields.get("ReqNodeList"))):
        return False
    left = commands.usable_nodes(fields.get("Partition", ""), fields.get("Features", ""), like=nodes[0])
    return len(left - {*nodes, *commands.node_list(fields.get("ExcNodeList"))}) >= plan.hosts


def requeue(plan: Plan, run: RunDirectory) -> str:
    """Have SLURM run this job's script again; a sentence that says what was done."""
    job, fields = job_id(), commands.job_fields(timeout_seconds=commands.CONTROLLER_TIMEOUT_SECONDS)
    if not fields:
        return f"SLURM does not answer, so job {job} was not requeued; repeat the `launch` command"
    if fields.get("BatchFlag") != "1":
        return f"job {job} has no batch script to requeue; repeat the `launch` command"
    if commands.was_requeued(fields):
        done = f"SLURM has requeued job {job}"
    elif fields.get("Requeue") == "1":
        reply = commands.run_until_reachable("scontrol", "requeue", job)
        if reply.returncode:
            return (
                f"job {job} cannot be requeued: {commands.message(reply.stderr)}; repeat the `launch` command"
            )
        done = f"job {job} is requeued"
    elif plan.submission is None:
        return f"job {job} does not allow requeueing; submit it again"
    else:
        run.job.write_id(submit(plan, run))
        return f"job {job} does not allow requeueing; submitted job {run.job.id()} instead"
    return done + _exclude_bad_nodes(run, job, commands.node_list(fields.get("ExcNodeList")))


def _exclude_bad_nodes(run: RunDirectory, job: str, before: list[str]) -> str:
    """Have a requeued job do without the nodes that failed twice, as a phrase; `before`: those it excludes already."""
    excluded = run.job.excluded_nodes()
    if not excluded:
        return ""
    nodes = ",".join(sorted({*excluded, *before}))
    reply = commands.run_until_reachable("scontrol", "update", f"JobId={job}", f"ExcNodeList={nodes}")
    return f" ({commands.message(reply.stderr)})" if reply.returncode else f", without {', '.join(excluded)}"


def prevent_requeue() -> None:
    # SLURM requeues a preempted job by itself, also one whose run has completed in the time that it was given.
    if commands.was_requeued(commands.job_fields()):
        commands.run("scancel", job_id())


def start(plan: Plan, run: RunDirectory, attempt: int) -> "SrunGang":
    return SrunGang(plan, run, attempt)


def adopt(plan: Plan, run: RunDirectory, attempt: int) -> None:
    """None, since a step ends with the job's launcher."""
