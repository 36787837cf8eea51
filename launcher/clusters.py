"""A cluster name becomes a ClusterSpec: where a run's processes go, and what devices each has.

Joining what is there already (a SLURM allocation) is decided in `default`.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from configs.clusters import SlurmCluster, TpuCluster, files, named
from configs.errors import UserError
from configs.load import changed, nearest
from launcher import accelerators
from launcher.metadata import TpuWorker
from launcher.place import Place

KINDS = {
    "local": "one process here, with every GPU of this machine, or one CPU device",
    "local-P": "P processes here, one CPU device each",
    "local-PxD": "P processes here, D CPU devices each",
    "slurm-NxG": "a SLURM job of N nodes with G GPUs each; G = 0: one CPU device each",
    "tpu-GEN-SIZE": "a Cloud TPU slice, such as tpu-v4-32; see `launch clusters tpu`",
    "NAME": "a cluster of clusters.yaml",
}
WITHOUT_ACCELERATOR = "local-2x2"
MOST_LOCAL_DEVICES = 256


@dataclass(frozen=True)
class ClusterSpec:
    name: str
    backend: str
    """Which file of launcher/backends/ starts it."""
    platform: str
    """jax platform of its devices: cpu, gpu or tpu."""
    hosts: int
    processes: int
    devices_per_process: int
    submission: SlurmCluster | TpuCluster | None = None
    """What the scheduler or the cloud is asked for; None where the processes are started from here."""


def default() -> ClusterSpec:
    """What `launch` means without --cluster: this SLURM allocation, all accelerators here, or two CPU processes."""
    if "SLURM_JOB_NUM_NODES" in os.environ:  # SLURM_JOB_ID alone is also set for logins to a node
        return _allocation(os.environ)
    return resolve("local" if accelerators.num_nvidia_gpus() else WITHOUT_ACCELERATOR)


def resolve(name: str, sbatch: tuple[str, ...] = (), settings: tuple[str, ...] = ()) -> ClusterSpec:
    """The cluster called `name`, with further `key=value` settings of it, and `option=value` of sbatch over those.

    Raises UserError, with the nearest name.
    """
    spec = _local(name)
    if spec is None:
        cluster = changed(_cluster(name), settings, "--set", name)
        if isinstance(cluster, SlurmCluster):
            return slurm(name, _with_options(cluster, sbatch))
        spec = tpu(name, cluster)
    elif settings:
        raise UserError(f"--set {settings[0]}: cluster {name} has no settings; see `launch clusters`")
    if sbatch:
        raise UserError(f"--sbatch {sbatch[0]}: cluster {name} is no SLURM cluster; see `launch clusters`")
    return spec


def of_cluster(name: str, cluster: SlurmCluster | TpuCluster) -> ClusterSpec:
    return slurm(name, cluster) if isinstance(cluster, SlurmCluster) else tpu(name, cluster)


def _local(name: str) -> ClusterSpec | None:
    if name == "local":
        return _this_machine()
    match = re.fullmatch(r"local-([0-9]{1,9})(?:x([0-9]{1,9}))?", name)
    if match is None:
        return None
    processes, devices = int(match[1]), int(match[2] or 1)
    if not 1 <= processes * devices <= MOST_LOCAL_DEVICES:
        raise UserError(
            f"cluster = {name}: {processes} × {devices} devices; allowed: 1 to {MOST_LOCAL_DEVICES} in all"
        )
    return ClusterSpec(name, "local", "cpu", 1, processes, devices)


def _cluster(name: str) -> SlurmCluster | TpuCluster:
    if match := re.fullmatch(r"slurm-([0-9]{1,6})x([0-9]{1,3})", name):
        nodes, gpus = int(match[1]), int(match[2])
        if not nodes:
            raise UserError(f"cluster = {name}: 0 nodes; allowed: at least 1")
        return SlurmCluster(nodes=nodes, gpus_per_node=gpus)
    found = named()
    if name in found:
        return found[name]
    if match := re.fullmatch(r"tpu-([A-Za-z0-9-]+)", name):
        return TpuCluster(accelerator=match[1])
    examples = ["local-2", "local-4", WITHOUT_ACCELERATOR, "slurm-2x1", "slurm-4x8", "tpu-v4-32"]
    raise UserError(
        f"cluster = {name}: unknown{nearest(name, [*KINDS, *examples, *found])} "
        f"(there are: {', '.join([*KINDS, *found])}; a NAME stands in {' or '.join(map(str, files()))})"
    )


def slurm(name: str, cluster: SlurmCluster, *, submit: bool = True) -> ClusterSpec:
    """Its processes and devices, to be submitted or already here."""
    tasks = cluster.tasks_per_node
    return ClusterSpec(
        name,
        "slurm",
        "gpu" if cluster.gpus_per_node else "cpu",
        cluster.nodes,
        cluster.nodes * tasks,
        (cluster.gpus_per_node // tasks) or 1,
        cluster if submit else None,
    )


def tpu(name: str, cluster: TpuCluster) -> ClusterSpec:
    """A process on each VM of its slices. On CPU there are as many devices."""
    one, num_slices = accelerators.tpu(cluster.accelerator)
    hosts = one.vms * num_slices
    return ClusterSpec(name, "tpu", cluster.platform, hosts, hosts, one.devices_per_vm, cluster)


def _with_options(cluster: SlurmCluster, options: tuple[str, ...]) -> SlurmCluster:
    """`option=value` or `option` of the command line, over what the cluster has."""
    given: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        given[key.removeprefix("--")] = value if equals else True
    settings = cluster.model_dump() | {"sbatch": cluster.sbatch | given}
    if "time" in given:  # one of them decides, and it is checked against save_minutes
        settings["time"] = settings["sbatch"].pop("time")
    try:
        return SlurmCluster.model_validate(settings)
    except ValidationError as e:
        raise UserError(
            f"--sbatch {' '.join(options)}: {e.errors()[0]['msg'].removeprefix('Value error, ')}"
        ) from None


def _allocation(environment: Mapping[str, str]) -> ClusterSpec:
    """The SLURM job in which `launch` was typed: all its nodes and GPUs."""
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise UserError(
            "this is one of several tasks of a SLURM step, and each would launch all of them; type "
            "`launch` in the batch script, or `srun … launch worker CONFIG`"
        )
    nodes = int(environment["SLURM_JOB_NUM_NODES"])
    # `gpu:8`, `a100:8` or `8`; where salloc leaves its shell on the login node, only the second is set.
    gpus = environment.get("SLURM_GPUS_ON_NODE") or environment.get("SLURM_GPUS_PER_NODE") or "0"
    count = gpus.rpartition(":")[2]
    num_gpus = int(count) if count.isdecimal() else 1  # a type alone
    # As many tasks as GPUs is how one asks for a process on each.
    tasks = environment.get("SLURM_NTASKS_PER_NODE")
    per_gpu = num_gpus > 1 and tasks == str(num_gpus)
    cluster = SlurmCluster(nodes=nodes, gpus_per_node=num_gpus, process_per="gpu" if per_gpu else "node")
    return slurm(f"slurm-{nodes}x{num_gpus}", cluster, submit=False)


def of_step(place: Place) -> ClusterSpec:
    """The tasks of the SLURM step in which `launch worker` was started."""
    gpus, tasks = int(os.environ.get("SLURM_GPUS_ON_NODE", 0)), place.processes_per_node
    name, platform = f"slurm-{len(place.nodes)}x{gpus}", "gpu" if gpus else "cpu"
    return ClusterSpec(name, "slurm", platform, len(place.nodes), place.processes, (gpus // tasks) or 1)


def of_vm(worker: TpuWorker) -> ClusterSpec:
    """The TPU slices on whose VMs `launch worker` was started."""
    one, _ = accelerators.tpu(worker.accelerator_type)
    if len(worker.addresses) != one.vms:
        raise UserError(
            f"{worker.accelerator_type} has {one.vms} VMs, and the metadata server tells of {len(worker.addresses)}"
        )
    name = f"tpu-{worker.accelerator_type}" + (f"x{worker.slices}" if worker.slices > 1 else "")
    platform = "cpu" if os.environ.get("JAX_PLATFORMS") == "cpu" else "tpu"
    hosts = one.vms * worker.slices
    return ClusterSpec(name, "tpu", platform, hosts, hosts, one.devices_per_vm)


def _this_machine() -> ClusterSpec:
    gpus = accelerators.num_nvidia_gpus()
    if gpus and not accelerators.has_cuda_plugin():
        raise UserError(
            f"cluster = local: this machine has {gpus} NVIDIA GPUs, but jax is installed without CUDA: "
            f"pip install 'podlaunch[cuda12]', or train on the CPU with --cluster {WITHOUT_ACCELERATOR}"
        )
    return ClusterSpec("local", "local", "gpu" if gpus else "cpu", 1, 1, gpus or 1)
