"""Imports go one way, and the commands of `launch` load no jax."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import configs

REPOSITORY = Path(configs.__file__).parent.parent
HEAVY = {"jax", "flax", "orbax", "optax", "grain", "trainer", "models"}


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)


def test_rooms_import_one_way():
    done = python("from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache")
    assert done.returncode == 0, done.stdout


LAUNCH = """
import sys
from launcher.commands.main import main
main(sys.argv[1:], standalone_mode=False)
print(*{name.partition(".")[0] for name in sys.modules})
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["plan", "configs/quickstart.yaml"], ["list"], ["clusters"]], ids=lambda a: a[0]
)
def test_launch_loads_no_jax(arguments):
    done = python(LAUNCH, *arguments)
    assert done.returncode == 0, done.stderr
    assert HEAVY & set(done.stdout.splitlines()[-1].split()) == set()


def test_help_of_launch_data_loads_neither_trainer_nor_pydantic():
    done = python(LAUNCH, "data", "convert", "--help")
    assert (HEAVY | {"pydantic", "numpy", "google"}) & set(done.stdout.splitlines()[-1].split()) == set()


def test_no_module_of_configs_and_launcher_loads_jax():
    # worker.py too: it imports jax inside a function, once its lifeline holds.
    done = python(
        "import importlib, pkgutil, sys, configs, launcher\n"
        "for package in (configs, launcher):\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "        print(module.name)\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    assert done.returncode == 0, done.stderr
    *modules, loaded = done.stdout.splitlines()
    assert {"launcher.host.worker", "launcher.backends.local", "configs.load"} <= set(modules)
    assert HEAVY & set(loaded.split()) == set()


def test_help_answers_at_once():
    def seconds() -> float:
        begun = time.monotonic()
        subprocess.run([sys.executable, "-m", "podlaunch", "--help"], check=True, capture_output=True)
        return time.monotonic() - begun

    # The best of some: the machine may have other work.
    assert min(seconds() for _ in range(3)) < 0.5
