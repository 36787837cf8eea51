"""What SLURM's variables say of this process, which of them its commands may see, and the names of nodes.

The variables are those of https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES.
"""

import functools
import itertools
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from configs.errors import UserError

# Each command of SLURM takes options from variables of its own and from those of the job or step around it.
_SLURM = re.compile(r"_?(SLURM|SLURMD|SBATCH|SRUN|SALLOC|SQUEUE|SINFO|SCONTROL|SCANCEL|SACCT)_\w+")
# These only say where SLURM is, and who asks.
_ACCESS = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_SACK_KEY", "SLURM_SACK_JWKS"}
# These say which job this is. srun takes no other option from them than the job's id.
_JOB = re.compile(r"SLURM_(JOB_\w+|JOBID|ARRAY_\w+|RESTART_COUNT|CLUSTER_NAME|SUBMIT_\w+)|_?SLURM_SPANK_\w+")


def command_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of SLURM's commands, and of the jobs that sbatch submits: none of SLURM's options is in it."""
    return {k: v for k, v in environment.items() if k in _ACCESS or not _SLURM.fullmatch(k)}


def step_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of an srun in this job: of SLURM's variables it has those that say which job this is."""
    job = {k: v for k, v in environment.items() if _JOB.fullmatch(k)}
    return command_environment(environment) | job


def ignored_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Variables by which the user may have meant to give options to sbatch, which does not get them."""
    # SLURM itself sets the second kind in jobs.
    return sorted(
        k
        for k in environment
        if k == "SLURM_CLUSTERS" or (k.startswith("SBATCH_") and not re.match("SBATCH_(MEM|CPU)_BIND", k))
    )


def job_id(environment: Mapping[str, str] = os.environ) -> str:
    """The id of this job; of a task of an array ARRAY_TASK, since the id of the last task is also that of the array."""
    job = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_TASK_ID" not in environment or not _may_be(job, "ArrayJobId"):
        return job
    return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"


@functools.cache
def _may_be(job: str, field: str) -> bool:
    """Whether a job has a field by which SLURM knows arrays and the like; True where SLURM does not answer.

    sbatch hands the variables of the job in which it is typed on to a job that is nothing of the kind.
    """
    try:
        command = ["scontrol", "--oneliner", "show", "job", job]
        done = subprocess.run(command, capture_output=True, text=True, env=command_environment())
    except FileNotFoundError:
        return True
    records = [line for line in done.stdout.splitlines() if re.match(rf"JobId={job}\b", line)]
    return not records or any(f" {field}=" in record for record in records)


def check_job(environment: Mapping[str, str] = os.environ) -> None:
    """Raises UserError in a heterogeneous job, whose components are jobs of their own to SLURM's commands."""
    if "SLURM_HET_SIZE" in environment and _may_be(environment["SLURM_JOB_ID"], "HetJobId"):
        raise UserError(
            f"this is a heterogeneous job of {environment['SLURM_HET_SIZE']} components, which podlaunch cannot use; "
            "submit a job whose nodes are all alike, without `:` or hetjob"
        )


@dataclass(frozen=True)
class SlurmTask:
    """One task of a step."""

    process: int
    processes: int
    local_process: int
    """Number of this task among those on its node."""
    node: str
    nodes: tuple[str, ...]
    """All nodes of the step, as SLURM names them."""
    step: str
    """JOB.STEP, as scancel takes it."""
    restart: int
    """How often the job was requeued."""

    @property
    def processes_per_node(self) -> int:
        return self.processes // len(self.nodes)


def current_task(environment: Mapping[str, str] = os.environ) -> SlurmTask | None:
    """The task that `srun`'s variables describe; None outside a step, as in a batch script.

    Raises UserError where the nodes have unequal numbers of tasks.
    """
    if "SLURM_STEP_ID" not in environment:
        return None
    check_job(environment)
    task = SlurmTask(
        process=int(environment["SLURM_PROCID"]),
        processes=int(environment["SLURM_STEP_NUM_TASKS"]),
        local_process=int(environment["SLURM_LOCALID"]),
        node=environment["SLURMD_NODENAME"],
        nodes=tuple(hostnames(environment["SLURM_STEP_NODELIST"])),
        step=f"{job_id(environment)}.{environment['SLURM_STEP_ID']}",
        restart=int(environment.get("SLURM_RESTART_COUNT", 0)),
    )
    if task.processes % len(task.nodes):
        raise UserError(
            f"this SLURM step has {task.processes} tasks on {len(task.nodes)} nodes; give each node the same number, "
            "with srun --ntasks-per-node"
        )
    return task


def hostnames(nodelist: str) -> list[str]:
    """The nodes of a SLURM node list, in order, as `scontrol show hostnames` expands it."""
    try:
        command = ["scontrol", "show", "hostnames", nodelist]
        done = subprocess.run(command, capture_output=True, text=True, env=command_environment())
        if done.returncode == 0 and done.stdout:
            return done.stdout.split()
    except FileNotFoundError:
        pass
    # Containers have no scontrol, and SLURM 22.05 refuses names with a suffix behind the brackets, such as n[1-2]-ib.
    return _expand(nodelist)


def node_address(node: str) -> str:
    """Where SLURM reaches a node: a name or an address. Its own name need not be one that resolves."""
    try:
        command = ["scontrol", "--oneliner", "show", "node", node]
        done = subprocess.run(command, capture_output=True, text=True, env=command_environment())
    except FileNotFoundError:  # in a container
        return node
    match = re.search(r"\bNodeAddr=(\S+)", done.stdout)
    return match[1] if match else node


def _expand(nodelist: str) -> list[str]:
    """`a[01-02,7]b[1-2],c` in full: each item is the product of its brackets."""
    names = []
    for item in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        parts = re.split(r"\[([^\]]*)\]", item)  # text, bracket, text, …
        choices = [expand_range(part) if i % 2 else [part] for i, part in enumerate(parts)]
        names += ["".join(chosen) for chosen in itertools.product(*choices)]
    return names


def expand_range(text: str) -> list[str]:
    """`01-03,7` in full, each number as wide as it is written."""
    found = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]
    return found
