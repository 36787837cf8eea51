"""Runs for the tests to launch, each in a folder of its own and ended with the test; and where they run.

A testbed is raised by each process of pytest that has a test for it, in a second: so tests run side by side.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clusters import cloud as google_cloud
from tests.clusters import network
from tests.clusters import slurm as slurm_testbed
from tests.clusters import tpu as tpu_testbed
from tests.clusters.cloud import Cloud, CloudRun
from tests.clusters.runs import CLUSTER, TINY, Run
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


def _completed(run: Run, *arguments: str, cluster: str = CLUSTER) -> Run:
    launched = run.launch(*arguments, cluster=cluster)
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
def raised_site() -> Iterator[Slurm]:
    network.skip_without(slurm_testbed.missing(), "SLURM")
    with slurm_testbed.raised(slurm_testbed.SITE_LAYOUT) as slurm:
        yield slurm


@pytest.fixture(scope="session")
def raised_vms() -> Iterator[Slice]:
    network.skip_without(tpu_testbed.missing(), "TPU")
    with tpu_testbed.raised() as vms:
        yield vms


@pytest.fixture(scope="session")
def cloud(raised_vms: Slice, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    with google_cloud.raised(raised_vms, tmp_path_factory.mktemp("compiled")) as cloud:
        yield cloud


@pytest.fixture(scope="session")
def make_cloud_run(
    cloud: Cloud, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., CloudRun]]:
    made: list[CloudRun] = []

    def make(recipe: Path | None = None, *, stub: bool = True, **settings: Any) -> CloudRun:
        folder = tmp_path_factory.mktemp("run")
        if recipe is None:
            recipe = folder / "tiny.yaml"
            recipe.write_text(TINY)
        made.append(CloudRun(cloud, folder, recipe, stub=stub, **settings))
        return made[-1]

    yield make
    for run in made:
        run.end()


@pytest.fixture
def cloud_run(make_cloud_run: Callable[..., CloudRun], cloud: Cloud) -> Iterator[CloudRun]:
    """A run of the tiny recipe on Cloud TPU by the stub, about to be launched."""
    yield from _ended_in(cloud, make_cloud_run())


@pytest.fixture
def cloud_training(make_cloud_run: Callable[..., CloudRun], cloud: Cloud) -> Iterator[CloudRun]:
    """One that trains."""
    yield from _ended_in(cloud, make_cloud_run(stub=False))


def _ended_in(cloud: Cloud, run: CloudRun) -> Iterator[CloudRun]:
    """With its test. All that it asked of the API was well-formed."""
    yield run
    run.end()
    cloud.clear()
    assert cloud.api.rejected == []


@pytest.fixture(scope="session")
def undisturbed(make_run: Make) -> Run:
    """The run that test_tpu.py and test_tpu_failures.py have, from beginning to end in one attempt, here."""
    return _completed(make_run(), google_cloud.SHORT, cluster="local-2")


@pytest.fixture(scope="session")
def undisturbed_training(make_run: Make) -> Run:
    """The one that trains, on as many processes and devices, here."""
    return _completed(make_run(stub=False), google_cloud.SHORT, cluster="local-2x4")
