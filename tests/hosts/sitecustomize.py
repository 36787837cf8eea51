"""Gives a worker on this machine a host of its own, as jax sees it: XLA knows hosts by their boot ids.

On PYTHONPATH, Python imports it at its start. HOSTS has the host of each process, as in "0,0,1,1". With REVERSED, the
devices of each host are laid in the opposite order, as those of a TPU may be: process 0 then has the last rows.
"""

import ctypes
import os
import sys
import uuid
from importlib.machinery import PathFinder
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
CLONE_NEWNS, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 0x1000, 0x4000, 0x40000


def _check(code: int) -> None:
    if code:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _move_to_host(host: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    file = Path(os.environ["LAUNCH_RUN"]) / f"boot-id-{os.environ['LAUNCH_PROCESS']}"
    file.write_text(f"{uuid.uuid5(uuid.NAMESPACE_OID, host)}\n")
    _check(libc.unshare(CLONE_NEWNS))  # os.unshare came with Python 3.12
    _check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    _check(libc.mount(bytes(file), bytes(BOOT_ID), None, MS_BIND, None))


class _Reversal:
    """Finds the file by which jax lays out devices, and changes what it does once it is loaded."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "jax._src.mesh_utils":
            return None
        spec = PathFinder.find_spec(name, path, target)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            create = module.create_device_mesh
            module.create_device_mesh = lambda *args, **kwargs: create(*args, **kwargs)[::-1]

        spec.loader.exec_module = exec_module
        return spec


if "REVERSED" in os.environ:
    sys.meta_path.insert(0, _Reversal)
if "LAUNCH_PROCESS" in os.environ and "HOSTS" in os.environ:
    _move_to_host(os.environ["HOSTS"].split(",")[int(os.environ["LAUNCH_PROCESS"])])
