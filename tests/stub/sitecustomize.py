"""With this folder on PYTHONPATH, a worker meets, steps and saves as ever, but learns nothing, and needs no jax.

Python imports this file when it starts. It serves tests of what is around the training.
tests/clusters/test_training.py compares what the stub reports and leaves with what a training does.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

REPLACED = {"jax": "jax.py", "trainer.loop": "loop.py"}


class Stubs:
    """Finds what is replaced before anybody else finds the real one."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in REPLACED:
            return None
        return importlib.util.spec_from_file_location(name, Path(__file__).with_name(REPLACED[name]))


sys.meta_path.insert(0, Stubs)
