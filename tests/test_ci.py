"""What checks a change: the workflow, .ci/run, the hook before a commit. They call what `make` has, and nothing else."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").iterdir())
VERSIONS = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (REPOSITORY / "setup.py").read_text())


def targets() -> set[str]:
    declared = re.search(r"^\.PHONY: (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert declared
    return set(declared[1].split())


def workflow(path: Path) -> dict[str, Any]:
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # `on` is a key, not true


def commands(path: Path) -> list[list[str]]:
    steps = [step for job in workflow(path)["jobs"].values() for step in job["steps"]]
    return [shlex.split(re.sub(r"\$\{\{.*?\}\}", "", step["run"])) for step in steps if "run" in step]


def is_ours(command: list[str]) -> bool:
    """`make TARGET…` or a script of the repository, perhaps as root and with variables set."""
    words = [word for word in command if not re.match(r"\w+=", word) and word not in ("sudo", "env")]
    if words[0] == "make":
        return set(words[1:]) <= targets()
    return len(words) == 1 and os.access(REPOSITORY / words[0], os.X_OK)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflow_calls_what_there_is(path: Path):
    assert {"on", "jobs"} <= workflow(path).keys()
    assert [command for command in commands(path) if not is_ours(command)] == []


def test_every_python_that_is_supported_is_tested():
    job = workflow(REPOSITORY / ".github" / "workflows" / "ci.yml")["jobs"]["linux"]
    assert job["strategy"]["matrix"]["python"] == VERSIONS


def test_hook_calls_what_there_is():
    config = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    (hook,) = (hook for repository in config["repos"] for hook in repository["hooks"])
    assert hook["language"] == "system"
    assert is_ours(shlex.split(hook["entry"]))


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What .ci/run has `make` do, where there is every Python."""
    for name in ("make", "python3", "python3.12", "python3.13"):
        program = tmp_path / name
        program.write_text(
            f'#!/bin/sh\n[ {name} = make ] && echo "$@" >>{tmp_path}/made; [ {name} = python3 ] && echo $VERSION; true\n'
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def made(**variables: str) -> list[str]:
        (tmp_path / "made").unlink(missing_ok=True)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHON"} | variables
        subprocess.run([REPOSITORY / ".ci" / "run"], env=environment, check=True, capture_output=True)
        return [line.split()[0] for line in (tmp_path / "made").read_text().splitlines()]

    return made


def test_ci_tests_the_other_pythons_too_unless_it_is_told_one(made):
    every = re.search(r"^test: (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert made(VERSION="3.11") == [*every, "test-fast", "test-fast"]
    assert made(VERSION="3.12") == [*every, "test-fast"]
    assert made(PYTHON="python3.13") == every
