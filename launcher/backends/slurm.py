"""SLURM: `launch` submits a job, which supervises the run on its first node and starts attempts with srun.

The state of a job is what squeue says, then sacct, then the run's own record.
"""

import math
import os
import shlex
import shutil
import sys
from collections import Counter
from typing import Any

from configs.clusters import SlurmCluster, seconds
from configs.errors import UserError
from configs.files import write_atomically
from launcher.backends import slurm_commands as commands
from launcher.backends.srun import Options, SrunGang, flags, slurm_cluster, srun_command
from launcher.gang import State, recorded_state
from launcher.machine.slurm import hostnames
from launcher.plan import Plan
from launcher.rundir import RunDirectory

REMOTE = False
POLL_SECONDS = 30.0
# SLURM may send the signal of --signal up to a minute early.
EARLY_SIGNAL_SECONDS = 60.0
# Once may be chance. More would cost as many restarts.
BAD_NODE_FAILURES = 2


# What is submitted


def render(plan: Plan) -> str:
    if plan.submission is None:
        return shlex.join(srun_command(plan, attempt=1))
    cluster = SlurmCluster.model_validate(plan.submission)
    python = cluster.python if cluster.python and not cluster.container else sys.executable
    supervise = [python, "-P", "-m", "podlaunch", "supervise", "--", plan.run_directory]
    return "\n".join(
        [
            "#!/bin/bash",
            # sbatch reads quotes in its lines as a shell does.
            *(f"#SBATCH {flag}" for flag in flags(_options(plan, cluster), quote=shlex.quote)),
            "",
            *cluster.setup,
            *(f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()),
            "# Starts and watches the workers on all nodes, and requeues this job if the run is saved and not yet done.",
            f"exec {shlex.join(supervise)}",
            "",
        ]
    )


def _options(plan: Plan, cluster: SlurmCluster) -> Options:
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
    logs, script = run.path / "logs", render(plan)
    logs.mkdir(exist_ok=True)
    # On the command line, since a line of the script cannot hold every path.
    output = f"{logs}/slurm-".replace("%", "%%") + "%j.log"
    command = ["sbatch", "--parsable", f"--output={output}"]
    if excluded := run.job.excluded_nodes():
        # An option of the command line replaces the script's, so both lists are given.
        users = cluster.sbatch.get("exclude")
        command.append(f"--exclude={','.join([*excluded, *([str(users)] if users else [])])}")
    done = commands.run(*command, text=script)
    if done.returncode:
        raise UserError(
            f"cluster = {plan.cluster}: SLURM refuses the job: {commands.message(done.stderr)}; "
            "correct the cluster's settings, or override them with --sbatch option=value"
        )
    write_atomically(run.path / "job.sbatch", script)  # for the user: SLURM has a copy of its own
    return done.stdout.strip().partition(";")[0]  # JOB, or JOB;CLUSTER


def _check_partition(name: str, cluster: SlurmCluster) -> None:
    """Raises UserError for a job that sbatch would accept and SLURM never start."""
    lines = commands.run("sinfo", "--noheader", "--format=%P|%D|%l|%L").stdout.splitlines()
    default = cluster.partition or os.environ.get("SBATCH_PARTITION", "")
    wanted = str(cluster.sbatch.get("partition", default)).split(",")
    rows = [line.split("|") for line in lines]
    if wanted == [""]:
        rows = [row for row in rows if row[0].endswith("*")]  # the site's default partition
    else:
        rows = [row for row in rows if row[0].rstrip("*") in wanted]
    if not rows:
        return  # sbatch explains it better
    partitions, nodes, limits, defaults = zip(*rows, strict=True)
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
    result, job = run.result(), run.job.id()
    if job is None or (result and result["status"] in ("completed", "failed", "stopped")):
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
    if run.attempts.last() == 0:
        description += f"; check that {run.path} is visible there"
    return State("interrupted", f"job {job} is {description}")


def cancel(run: RunDirectory) -> None:
    done = commands.run("scancel", run.job.id() or "")
    if done.returncode:
        reason = commands.message(done.stderr)
        raise UserError(f"job {run.job.id()} of run {run.name} cannot be cancelled: {reason}")


# In the job


def check(plan: Plan) -> None:
    """Raises UserError where this job would be over before it could save."""
    if "SLURM_JOB_ID" not in os.environ:
        raise UserError("this is no SLURM job: `launch supervise` is for batch scripts; type `launch CONFIG`")
    limit_minutes, save_minutes = commands.job_seconds("%l") / 60, slurm_cluster(plan).save_minutes
    if limit_minutes <= save_minutes:
        raise UserError(
            f"the time limit of job {commands.job_id()} is {limit_minutes:g} minutes, not above the {save_minutes:g} "
            "before its end at which the run begins to save; raise the time limit"
        )


def job_info() -> dict[str, Any]:
    job, count = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", 0)
    return {"job": job, "restart_count": int(count) if job else None}


def can_restart(plan: Plan, run: RunDirectory) -> bool:
    """Whether there is time to train and save, on nodes of which none failed twice."""
    failures = [a["failure"] for a in run.attempts.of_launch() if a["failure"]]
    # An exit code is the program's own doing. A signal, or a start that failed, may be the node's.
    counts = Counter(f["host"] for f in failures if not f["cause"].startswith(("exit code", "srun")))
    bad_nodes = [host for host, count in counts.items() if count >= BAD_NODE_FAILURES]
    run.job.exclude_nodes(bad_nodes)
    if set(commands.job_nodes()) & set(bad_nodes):
        return False
    # A minute to train, before the minute in which SLURM may already signal.
    return commands.job_seconds("%L") > 60 * slurm_cluster(plan).save_minutes + 2 * EARLY_SIGNAL_SECONDS


def requeue(plan: Plan, run: RunDirectory) -> str:
    """Have SLURM run this job's script again; a sentence that says what was done."""
    job, fields = commands.job_id(), commands.job_fields(timeout_seconds=commands.CONTROLLER_TIMEOUT_SECONDS)
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
    return done + _exclude_bad_nodes(run, job, fields.get("ExcNodeList", "(null)"))


def _exclude_bad_nodes(run: RunDirectory, job: str, before: str) -> str:
    """Have a requeued job do without the nodes that failed twice, as a phrase; `before`: those it excludes already."""
    excluded = run.job.excluded_nodes()
    if not excluded:
        return ""
    nodes = ",".join(sorted({*excluded, *([] if before == "(null)" else hostnames(before))}))
    reply = commands.run_until_reachable("scontrol", "update", f"JobId={job}", f"ExcNodeList={nodes}")
    return f" ({commands.message(reply.stderr)})" if reply.returncode else f", without {', '.join(excluded)}"


def prevent_requeue() -> None:
    # SLURM requeues a preempted job by itself, also one whose run has completed in the time that it was given.
    if commands.was_requeued(commands.job_fields()):
        commands.run("scancel", commands.job_id())


def start(plan: Plan, run: RunDirectory, attempt: int) -> "SrunGang":
    return SrunGang(plan, run, attempt)


def adopt(plan: Plan, run: RunDirectory, attempt: int) -> None:
    """None, since a step ends with the job's launcher."""
