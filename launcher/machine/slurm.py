"""The task of a SLURM step that this process is, and the names of the step's nodes.

The variables are those of https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES.
"""

import itertools
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from configs.errors import UserError


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
    task = SlurmTask(
        process=int(environment["SLURM_PROCID"]),
        processes=int(environment["SLURM_STEP_NUM_TASKS"]),
        local_process=int(environment["SLURM_LOCALID"]),
        node=environment["SLURMD_NODENAME"],
        nodes=tuple(hostnames(environment["SLURM_STEP_NODELIST"])),
        step=f"{environment['SLURM_JOB_ID']}.{environment['SLURM_STEP_ID']}",
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
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout:
            return done.stdout.split()
    except FileNotFoundError:
        pass
    # Containers have no scontrol, and SLURM 22.05 refuses names with a suffix behind the brackets, such as n[1-2]-ib.
    return _expand(nodelist)


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
