"""Runs for the tests to launch: each in a folder of its own, and ended with the test."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clusters.runs import TINY, Run


@pytest.fixture(scope="session")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Run]]:
    """Makes runs, of the tiny recipe or another; whatever they started ends with the session."""
    made: list[Run] = []

    def make(recipe: Path | None = None, environment: dict[str, str] | None = None) -> Run:
        folder = tmp_path_factory.mktemp("run")
        if recipe is None:
            recipe = folder / "tiny.yaml"
            recipe.write_text(TINY)
        made.append(Run(folder, recipe, environment or dict(os.environ)))
        return made[-1]

    yield make
    for run in made:
        run.end()


@pytest.fixture
def run(make_run: Callable[..., Run]) -> Iterator[Run]:
    """A run of the tiny recipe, about to be launched."""
    run = make_run()
    yield run
    run.end()
    shutil.rmtree(run.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def uninterrupted(make_run: Callable[..., Run]) -> Run:
    """The same run, from beginning to end in one attempt."""
    run = make_run()
    launched = run.launch()
    assert launched.wait() == 0, launched.text
    return run


@pytest.fixture
def mount(run: Run) -> Iterator[Callable[..., None]]:
    """Makes the root of `run` a small disk of its own."""

    def mounted(*options: str) -> None:
        run.root.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(run.root)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("only root may mount a disk")

    yield mounted
    run.end()
    subprocess.run(["umount", "--lazy", str(run.root)], capture_output=True)
