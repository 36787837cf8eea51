"""A cluster name becomes a ClusterSpec: where a run's processes go, and what devices each has.

Joining a gang that is already there (inside a SLURM step, on a TPU VM) is decided in `default`.
"""

import re
from dataclasses import dataclass

from configs.errors import UserError
from configs.load import nearest
from launcher import accelerators

KINDS = {
    "local": "one process here, with every GPU of this machine, or one CPU device",
    "local-P": "P processes here, one CPU device each",
    "local-PxD": "P processes here, D CPU devices each",
}
WITHOUT_ACCELERATOR = "local-2x2"
MOST_LOCAL_DEVICES = 256


@dataclass(frozen=True)
class ClusterSpec:
    name: str
    backend: str
    """Which file of launcher/backends/ starts it."""
    platform: str
    """jax platform of its devices: cpu or gpu."""
    processes: int
    devices_per_process: int


def default() -> ClusterSpec:
    """What `launch` means without --cluster: all accelerators of this machine, or two CPU processes."""
    return resolve("local" if accelerators.num_nvidia_gpus() else WITHOUT_ACCELERATOR)


def resolve(name: str) -> ClusterSpec:
    """The cluster called `name`. Raises UserError, with the nearest valid name."""
    if name == "local":
        return _this_machine()
    match = re.fullmatch(r"local-([0-9]{1,9})(?:x([0-9]{1,9}))?", name)
    if not match:
        known = [*KINDS, "local-2", "local-4", WITHOUT_ACCELERATOR]
        raise UserError(f"cluster = {name}: unknown{nearest(name, known)} (there are: {', '.join(KINDS)})")
    processes, devices = int(match[1]), int(match[2] or 1)
    if not 1 <= processes * devices <= MOST_LOCAL_DEVICES:
        raise UserError(
            f"cluster = {name}: {processes} × {devices} devices; allowed: 1 to {MOST_LOCAL_DEVICES} in all"
        )
    return ClusterSpec(name, "local", "cpu", processes, devices)


def _this_machine() -> ClusterSpec:
    gpus = accelerators.num_nvidia_gpus()
    if gpus and not accelerators.has_cuda_plugin():
        raise UserError(
            f"cluster = local: this machine has {gpus} NVIDIA GPUs, but jax is installed without CUDA: "
            f"pip install 'podlaunch[cuda12]', or train on the CPU with --cluster {WITHOUT_ACCELERATOR}"
        )
    return ClusterSpec("local", "local", "gpu" if gpus else "cpu", 1, gpus or 1)
