"""SLURM's commands, and what they say of this job."""

import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence

from configs.clusters import seconds
from configs.errors import UserError
from launcher.machine.slurm import command_environment, hostnames, job_id

# A controller that fails over, or is restarted under running jobs, is back after that.
CONTROLLER_TIMEOUT_SECONDS = 120.0
RETRY_SECONDS = 2.0

Completed = subprocess.CompletedProcess[str]


def run(*command: str) -> Completed:
    """Run a command of SLURM. Raises UserError where this machine does not have it."""
    try:
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=command_environment()
        )
    except FileNotFoundError:
        raise UserError(f"there is no {command[0]} on this machine; type this where SLURM is") from None


def run_until_reachable(*command: str, timeout_seconds: float = CONTROLLER_TIMEOUT_SECONDS) -> Completed:
    """Run a command again while the controller cannot be reached, since it may be restarting."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        done = run(*command)
        is_out_of_reach = done.returncode and re.search(
            r"contact|connect|timed out|zero bytes", done.stderr, re.I
        )
        if not is_out_of_reach or time.monotonic() > deadline:
            return done
        time.sleep(RETRY_SECONDS)


def message(stderr: str) -> str:
    """The message of SLURM in one line."""
    lines = [re.sub(r"^\w+: (error: )?", "", line) for line in stderr.strip().splitlines()]
    return "; ".join(lines) or "no reason given"


def submitted_id(stdout: str) -> str | None:
    """The id of a job in what `sbatch --parsable` printed, perhaps between the lines of a site's own wrapper."""
    ids = [match[1] for line in stdout.splitlines() if (match := re.fullmatch(r"(\d+)(;\S+)?", line.strip()))]
    return ids[-1] if ids else None


def job_nodes() -> list[str]:
    return hostnames(os.environ["SLURM_JOB_NODELIST"])


def job_seconds(field: str) -> float:
    """Seconds of the time limit of this job (`%l`), or of the rest of its time (`%L`); infinite where unknown."""
    done = run("squeue", "--noheader", f"--jobs={job_id()}", f"--format={field}")
    return limit_seconds(done.stdout.strip())


def job_fields(timeout_seconds: float = 0.0) -> dict[str, str]:
    """Fields of `scontrol show job`; empty where SLURM cannot be asked, as in a container."""
    if not shutil.which("scontrol"):
        return {}
    command = ("scontrol", "--oneliner", "show", "job", job_id())
    text = run_until_reachable(*command, timeout_seconds=timeout_seconds).stdout
    # Reversed, so that the first of two fields wins: a job's comment, at the end, may look like any field.
    return dict(reversed(re.findall(r"(\w+)=(\S*)", text)))


def node_list(field: str | None) -> list[str]:
    """The nodes of a field of `scontrol show job`."""
    return [] if field in (None, "", "(null)") else hostnames(field)


def usable_nodes(partition: str, features: str, like: str) -> set[str]:
    """The nodes of a partition that are up, now free or not, with all `features`, where these are plain.

    Partitions mix nodes: each has at least the CPUs and the memory of the node `like`, and its generic resources.
    """
    done = run("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N|%T|%f|%c|%m|%G")
    rows = {row[0]: row[1:] for line in done.stdout.splitlines() if len(row := line.split("|")) == 6}
    wanted = set(features.split("&")) if re.fullmatch(r"[\w&.-]+", features) else set()
    is_down = re.compile(r"down|drain|fail|unknown|.*\*")
    model = _size(rows[like]) if like in rows else (0, 0, "")

    def is_usable(row: Sequence[str]) -> bool:
        cpus, memory, gres = _size(row)
        is_like = cpus >= model[0] and memory >= model[1] and gres == model[2]
        return is_like and not is_down.match(row[0]) and wanted <= set(row[1].split(","))

    return {node for node, row in rows.items() if is_usable(row)}


def _size(row: Sequence[str]) -> tuple[int, int, str]:
    """CPUs, memory and generic resources of a node in a row of sinfo; which sockets the latter are at is left out."""
    *_, cpus, memory, gres = row
    return int(cpus), int(memory), re.sub(r"\(S:[^)]*\)", "", gres)


def was_requeued(fields: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the job was requeued since it began."""
    return int(fields.get("Restarts", 0)) > int(environment.get("SLURM_RESTART_COUNT", 0))


def stopped_by(fields: Mapping[str, str], environment: Mapping[str, str]) -> str:
    """`stopped` where a user cancelled the job, else `preempted`.

    SLURM does not record a cancellation while the job ends, so all other reasons are excluded.
    """
    is_ending = fields.get("JobState") in ("COMPLETING", "CANCELLED")
    is_over = seconds(fields.get("RunTime", "0")) >= seconds(fields.get("TimeLimit", "UNLIMITED"))
    is_preempted = was_requeued(fields, environment) or fields.get("PreemptTime", "None") != "None"
    has_lost_nodes = fields.get("Reason") in ("NodeDown", "PartitionDown")
    return "preempted" if not is_ending or is_over or is_preempted or has_lost_nodes else "stopped"


def current_stop_cause() -> str:
    """Who ends the step of the user's own srun: `stopped` or `preempted`."""
    return stopped_by(job_fields(), os.environ)


def limit_seconds(text: str) -> float:
    """Seconds of a time limit; infinite for what is no time, such as n/a."""
    try:
        return seconds(text)
    except ValueError:
        return math.inf
