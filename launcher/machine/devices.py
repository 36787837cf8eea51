"""The accelerators of this machine, found without importing jax, and the processes that have them open."""

import contextlib
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path


def num_nvidia_gpus(dev: Path = Path("/dev")) -> int:
    """Number of NVIDIA GPUs that a process started here may use: device files, less what CUDA_VISIBLE_DEVICES hides."""
    present = sum(1 for p in dev.glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    count = 0
    for device in map(str.strip, visible.split(",")):
        if not (device.startswith(("GPU-", "MIG-")) or (device.isdecimal() and int(device) < present)):
            break  # CUDA does the same: an invalid id hides itself and all ids behind it
        count += 1
    return count


def has_cuda_plugin() -> bool:
    """Whether jax was installed here with CUDA support."""
    return any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13))


def cuda_advice(driver: Path = Path("/proc/driver/nvidia/version")) -> str:
    """What the user has to do on this machine so that its jax finds the NVIDIA GPUs, as the end of a sentence."""
    try:
        # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 …", then a line on the compiler.
        found = re.search(r"^NVRM.*? (\d+)\.\d+", driver.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is None:
        return "pip install 'podlaunch[cuda12]' (or cuda13, for an NVIDIA driver of version 580 or newer)"
    # https://docs.jax.dev/en/latest/installation.html
    version = int(found[1])
    if version < 525:
        return f"update the NVIDIA driver to 525 or newer (it is {version}), then pip install 'podlaunch[cuda12]'"
    extra = "cuda13" if version >= 580 else "cuda12"
    return f"pip install 'podlaunch[{extra}]' (the NVIDIA driver is {version})"


def tpu_chips(dev: Path = Path("/dev")) -> list[Path]:
    """Device files of the TPU chips of this machine. Older generations are accel*, newer ones are in vfio/."""
    files = [*dev.glob("accel*"), *dev.glob("vfio/*")]
    return sorted(file for file in files if re.fullmatch(r"accel\d+|vfio/\d+", str(file.relative_to(dev))))


def processes_using(files: Sequence[Path]) -> list[str]:
    """Processes of this machine that have one of `files` open, each with its id and the beginning of its command."""
    found = []
    wanted = {str(file) for file in files}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            if any(os.path.realpath(fd) in wanted for fd in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append(f"process {process.name} ({command.strip()[:80]})")
    return found
