"""The name of a cluster becomes a ClusterSpec: where a run's processes go, and what devices each has.

Without a name, `default_cluster` decides, for instance for the SLURM allocation in which `launch` is typed.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from configs.clusters import SlurmCluster, TpuCluster, files, named_clusters
from configs.errors import UserError
from configs.load import nearest, with_settings
from launcher.accelerators import TpuSlice, parse_tpu
from launcher.machine.devices import cuda_advice, has_cuda_plugin, num_nvidia_gpus
from launcher.machine.metadata import TpuWorker
from launcher.machine.slurm import SlurmTask, check_job
from launcher.plan import ClusterSpec

KINDS = {
    "local": "one process here, with every GPU of this machine, or one CPU device",
    "local-P": "P processes here, one CPU device each",
    "local-PxD": "P processes here, D CPU devices each",
    "slurm-NxG": "a SLURM job of N nodes with G GPUs each; G = 0: one CPU device each",
    "tpu-GEN-SIZE": "a Cloud TPU slice, such as tpu-v4-32; see `launch clusters tpu`",
    "NAME": "a cluster of clusters.yaml",
}
CPU_DEFAULT = "local-2x2"
MAX_LOCAL_DEVICES = 256  # a typing error must not start thousands of processes


def default_cluster() -> ClusterSpec:
    """The cluster without --cluster: this SLURM allocation, all GPUs of this machine, or two CPU processes."""
    # SLURM_JOB_ID alone is not enough: SLURM also sets it for an ssh login to a node.
    if "SLURM_JOB_NUM_NODES" in os.environ:
        return _from_allocation(os.environ)
    return resolve("local" if num_nvidia_gpus() else CPU_DEFAULT)


def resolve(name: str, sbatch: tuple[str, ...] = (), settings: tuple[str, ...] = ()) -> ClusterSpec:
    """The cluster called `name`, with its settings overridden by `key=value` and by sbatch's `option=value`.

    Raises UserError, with the nearest name.
    """
    spec = _local(name)
    if spec is None:
        cluster = with_settings(_cluster(name), settings, "--set", name)
        if isinstance(cluster, SlurmCluster):
            return slurm_spec(name, _with_options(cluster, sbatch))
        spec = tpu_spec(name, cluster)
    elif settings:
        raise UserError(f"--set {settings[0]}: cluster {name} has no settings; see `launch clusters`")
    if sbatch:
        raise UserError(f"--sbatch {sbatch[0]}: cluster {name} is not a SLURM cluster; see `launch clusters`")
    return spec


def from_settings(name: str, cluster: SlurmCluster | TpuCluster) -> ClusterSpec:
    """The named cluster of clusters.yaml."""
    return slurm_spec(name, cluster) if isinstance(cluster, SlurmCluster) else tpu_spec(name, cluster)


def _local(name: str) -> ClusterSpec | None:
    if name == "local":
        return _this_machine()
    match = re.fullmatch(r"local-([0-9]{1,9})(?:x([0-9]{1,9}))?", name)
    if match is None:
        return None
    processes, devices = int(match[1]), int(match[2] or 1)
    if not 1 <= processes * devices <= MAX_LOCAL_DEVICES:
        product = f"{processes} × {devices} devices"
        raise UserError(f"cluster = {name}: {product}; allowed: 1 to {MAX_LOCAL_DEVICES} in all")
    return ClusterSpec(name, "local", "cpu", 1, processes, devices)


def _cluster(name: str) -> SlurmCluster | TpuCluster:
    if match := re.fullmatch(r"slurm-([0-9]{1,6})x([0-9]{1,3})", name):
        nodes, gpus = int(match[1]), int(match[2])
        if not nodes:
            raise UserError(f"cluster = {name}: 0 nodes; allowed: at least 1")
        return SlurmCluster(nodes=nodes, gpus_per_node=gpus)
    found = named_clusters()
    if name in found:
        return found[name]
    if match := re.fullmatch(r"tpu-([A-Za-z0-9-]+)", name):
        return TpuCluster(accelerator=match[1])
    examples = ["local-2", "local-4", CPU_DEFAULT, "slurm-2x1", "slurm-4x8", "tpu-v4-32"]
    raise UserError(
        f"cluster = {name}: unknown{nearest(name, [*KINDS, *examples, *found])} "
        f"(there are: {', '.join([*KINDS, *found])}; a NAME is defined in {' or '.join(map(str, files()))})"
    )


def slurm_spec(name: str, cluster: SlurmCluster, *, submit: bool = True) -> ClusterSpec:
    """Processes and devices of a SLURM cluster; `submit`: they run in a job that is yet to be submitted."""
    nodes, gpus, tasks = cluster.nodes, cluster.gpus_per_node, cluster.tasks_per_node
    spec = _slurm(name, nodes, gpus, tasks)
    return replace(spec, submission=cluster) if submit else spec


def _slurm(name: str, nodes: int, gpus: int, tasks: int) -> ClusterSpec:
    """`gpus` and `tasks` are those of each node."""
    platform = "gpu" if gpus else "cpu"
    return ClusterSpec(name, "slurm", platform, nodes, nodes * tasks, (gpus // tasks) or 1, slices=nodes)


def tpu_spec(name: str, cluster: TpuCluster) -> ClusterSpec:
    """One process on each VM of the slices. On the CPU platform it has as many devices as on the chips."""
    tpu, num_slices = parse_tpu(cluster.accelerator)
    return _tpu(name, cluster.platform, tpu, num_slices, cluster)


def _tpu(
    name: str, platform: str, tpu: TpuSlice, num_slices: int, submission: TpuCluster | None = None
) -> ClusterSpec:
    hosts = tpu.vms * num_slices
    # CPU devices are joined by the host that they share, not by the slice that they stand for.
    slices = hosts if platform == "cpu" else num_slices
    return ClusterSpec(name, "tpu", platform, hosts, hosts, tpu.devices_per_vm, slices, submission)


def _with_options(cluster: SlurmCluster, options: tuple[str, ...]) -> SlurmCluster:
    """The cluster with the `option=value` and `option` of the command line, which replace its own."""
    sbatch: dict[str, Any] = dict(cluster.sbatch)
    for option in options:
        key, equals, value = option.partition("=")
        sbatch[key.removeprefix("--")] = value if equals else True
    settings = cluster.model_dump() | {"sbatch": sbatch}
    if "time" in sbatch:  # the cluster has a setting for it, which is checked against save_minutes
        settings["time"] = sbatch.pop("time")
    try:
        return SlurmCluster.model_validate(settings)
    except ValidationError as e:
        problem = e.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"--sbatch {' '.join(options)}: {problem}") from None


def _from_allocation(environment: Mapping[str, str]) -> ClusterSpec:
    """The SLURM job in which `launch` was typed: all its nodes and GPUs."""
    check_job(environment)
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise UserError(
            "`launch` was started by several tasks of a SLURM step, and each task would start a run; call "
            "`launch` in the batch script, or `srun … launch worker CONFIG`"
        )
    nodes = int(environment["SLURM_JOB_NUM_NODES"])
    # `gpu:8`, `a100:8` or `8`; where salloc leaves its shell on the login node, only the second is set.
    gpus = environment.get("SLURM_GPUS_ON_NODE") or environment.get("SLURM_GPUS_PER_NODE") or "0"
    count = gpus.rpartition(":")[2]
    num_gpus = int(count) if count.isdecimal() else 1  # a type alone
    # A user who wants one process for each GPU asks SLURM for as many tasks as GPUs.
    tasks = environment.get("SLURM_NTASKS_PER_NODE")
    per_gpu = num_gpus > 1 and tasks == str(num_gpus)
    cluster = SlurmCluster(nodes=nodes, gpus_per_node=num_gpus, process_per="gpu" if per_gpu else "node")
    return slurm_spec(f"slurm-{nodes}x{num_gpus}", cluster, submit=False)


def from_slurm_task(task: SlurmTask) -> ClusterSpec:
    """The tasks of the SLURM step in which `launch worker` was started."""
    nodes, gpus = len(task.nodes), int(os.environ.get("SLURM_GPUS_ON_NODE", 0))
    return _slurm(f"slurm-{nodes}x{gpus}", nodes, gpus, task.processes_per_node)


def from_tpu_worker(worker: TpuWorker) -> ClusterSpec:
    """The TPU slices on whose VMs `launch worker` was started."""
    accelerator, num_vms = worker.accelerator_type, len(worker.addresses)
    tpu, _ = parse_tpu(accelerator)
    if num_vms != tpu.vms:
        raise UserError(f"{accelerator} has {tpu.vms} VMs, but the metadata server lists {num_vms}")
    name = f"tpu-{accelerator}" + (f"x{worker.slices}" if worker.slices > 1 else "")
    return _tpu(name, "cpu" if os.environ.get("JAX_PLATFORMS") == "cpu" else "tpu", tpu, worker.slices)


def _this_machine() -> ClusterSpec:
    gpus = num_nvidia_gpus()
    if gpus and not has_cuda_plugin():
        raise UserError(
            f"cluster = local: this machine has {gpus} NVIDIA GPUs, but jax is installed without CUDA: "
            f"{cuda_advice()}, or train on the CPU with --cluster {CPU_DEFAULT}"
        )
    return ClusterSpec("local", "local", "gpu" if gpus else "cpu", 1, 1, gpus or 1)
