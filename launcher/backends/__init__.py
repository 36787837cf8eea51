"""How a plan's processes are started, watched and stopped. A new scheduler is one file here and one line below."""

import importlib
from typing import cast

from launcher.gang import Backend, Queue, Remote

BACKENDS = {
    "local": "launcher.backends.local",
    "slurm": "launcher.backends.slurm",
    "tpu": "launcher.backends.tpu",
}


def get(name: str) -> Backend:
    return cast(Backend, importlib.import_module(BACKENDS[name]))


def get_queue(name: str) -> Queue:
    return cast(Queue, get(name))


def get_remote(name: str) -> Remote:
    return cast(Remote, get(name))
