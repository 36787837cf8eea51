"""How the gang of a SLURM step reads srun's messages, with a script in place of srun."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import UserError
from launcher.backends import slurm
from launcher.backends.srun import SrunGang
from launcher.gang import Exit
from launcher.rundir import RunDirectory


@pytest.fixture
def fake_command(tmp_path, monkeypatch):
    """Puts a shell script in place of a SLURM command on the PATH."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "12")

    def fake(command: str, script: str) -> None:
        (programs / command).write_text(f"#!/bin/sh\n{script}\n")
        (programs / command).chmod(0o755)

    return fake


@pytest.fixture
def exits_of(fake_command, planned, tmp_path, monkeypatch):
    """All exits of a gang on the nodes n1 and n2, whose srun is this script."""
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    run = RunDirectory(tmp_path / "runs" / "quickstart")
    plan = replace(planned(), hosts=2, run_directory=str(run.path))
    run.attempts.begin({})

    def exits_of(script: str) -> list[Exit]:
        fake_command("srun", script)
        gang, exits = SrunGang(plan, run, 1), []
        deadline = time.monotonic() + 60
        while len(exits) < 2:
            exits += gang.poll(0.1)
            assert time.monotonic() < deadline
        return exits

    return exits_of


def test_node_that_cannot_be_reached_is_named_and_no_other(exits_of):
    line = "srun: error: Task launch for StepId=12.0 failed on node n2: Communication connection failure"
    first, second = exits_of(f"echo '{line}' >&2; exit 1")
    assert first == Exit(1, 1, "n2", "not started", "Communication connection failure")
    assert (second.process, second.host, second.cause) == (0, "n1", "srun failed")


def test_task_that_srun_saw_end_is_named_with_its_code(exits_of):
    lines = "srun: error: n2: task 1: Killed", "srun: error: n1: task 0: Exited with exit code 3"
    script = "; ".join(f"echo '{line}' >&2" for line in lines)
    assert exits_of(f"{script}; exit 1") == [Exit(1, -9, "n2"), Exit(0, 3, "n1")]


def test_srun_that_starts_nothing_says_why(exits_of):
    first, _ = exits_of("echo 'srun: error: Unable to create step: Invalid node count' >&2; exit 1")
    assert (first.process, first.cause) == (0, "srun failed")
    assert first.error == "srun: error: Unable to create step: Invalid node count"


@pytest.mark.parametrize(("limit", "refused"), [("5:00", True), ("5:01", False), ("UNLIMITED", False)])
def test_job_needs_more_time_than_saving_takes(fake_command, planned, limit, refused):
    fake_command("squeue", f"echo {limit}")
    plan = planned()  # save_minutes is 5
    if refused:
        with pytest.raises(UserError, match="the time limit of job 12 is 5 minutes, not above the 5 before"):
            slurm.check(plan)
    else:
        slurm.check(plan)


def test_lines_that_are_no_reports_are_logged(exits_of, tmp_path):
    exits_of("echo '{\"no\": \"report\"}'; echo 'pmix: warning'; exit 1")
    log = Path(tmp_path / "runs/quickstart/logs/attempt-1/srun.log").read_text()
    assert log.splitlines() == ['{"no": "report"}', "pmix: warning"]
