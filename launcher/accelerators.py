"""Which accelerators this machine has, found without importing jax."""

import importlib.util
import os
import re
from pathlib import Path


def num_nvidia_gpus(dev: Path = Path("/dev")) -> int:
    """NVIDIA GPUs that a process started here may use: device files, less what CUDA_VISIBLE_DEVICES hides."""
    present = sum(1 for p in dev.glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    count = 0
    for device in map(str.strip, visible.split(",")):
        if not (device.startswith(("GPU-", "MIG-")) or (device.isdecimal() and int(device) < present)):
            break  # as CUDA: an id that is none hides itself and all behind it
        count += 1
    return count


def has_cuda_plugin() -> bool:
    """Whether jax here was installed with CUDA support."""
    return any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13))
