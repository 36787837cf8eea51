"""Runs for the tests to launch, each in a folder of its own and ended with the test; and where they run.

A testbed is raised by each process of pytest that has a test for it, in a second: so tests run side by side.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clusters import network
from tests.clusters import slurm as slurm_testbed
from tests.clusters import tpu as tpu_testbed
from tests.clusters.runs import TINY, Run
from tests.clusters.slurm import Slurm
from tests.clusters.tpu import Slice

Make = Callable[..., Run]


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """Makes runs, of the tiny recipe or another; whatever they started ends with the session."""
    made: list[Run] = []

    def make(
        recipe: Path | None = None, environment: dict[str, str] | None = None, *, stub: bool = True
    ) -> Run:
        folder = tmp_path_factory.mktemp("run")
        if recipe is None:
            recipe = folder / "tiny.yaml"
            recipe.write_text(TINY)
        made.append(Run(folder, recipe, environment or dict(os.environ), stub=stub))
        return made[-1]

    yield make
    for run in made:
        run.end()


@pytest.fixture
def run(make_run: Make) -> Iterator[Run]:
    """A run of the tiny recipe by the stub, about to be launched."""
    yield from _ended(make_run())


@pytest.fixture
def training(make_run: Make) -> Iterator[Run]:
    """A run of the tiny recipe that trains, about to be launched."""
    yield from _ended(make_run(stub=False))


def _ended(run: Run) -> Iterator[Run]:
    yield run
    run.end()
    shutil.rmtree(run.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def uninterrupted(make_run: Make) -> Run:
    """The same run as `run`, from beginning to end in one attempt."""
    return _completed(make_run())


@pytest.fixture(scope="session")
def trained(make_run: Make) -> Run:
    """The same run as `training`, from beginning to end in one attempt."""
    return _completed(make_run(stub=False))


def _completed(run: Run) -> Run:
    launched = run.launch()
    assert launched.wait() == 0, launched.text
    return run


@pytest.fixture
def mount(training: Run) -> Iterator[Callable[..., None]]:
    """Makes the root of `training` a small disk of its own."""

    def mounted(*options: str) -> None:
        training.root.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(training.root)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("only root may mount a disk")

    yield mounted
    training.end()
    subprocess.run(["umount", "--lazy", str(training.root)], capture_output=True)


@pytest.fixture(scope="session")
def raised_slurm() -> Iterator[Slurm]:
    network.skip_without(slurm_testbed.missing(), "SLURM")
    with slurm_testbed.raised() as slurm:
        yield slurm


@pytest.fixture(scope="session")
def raised_vms() -> Iterator[Slice]:
    network.skip_without(tpu_testbed.missing(), "TPU")
    with tpu_testbed.raised() as vms:
        yield vms
