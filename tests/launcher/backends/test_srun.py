"""How the gang of a SLURM step reads srun's messages, with a script in place of srun."""

import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import UserError
from launcher.backends import slurm
from launcher.backends.srun import SrunGang
from launcher.gang import Exit, State
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


def test_srun_that_starts_nothing_says_why_and_not_what_follows_from_it(exits_of):
    lines = (
        "srun: warning",
        "srun: error: Unable to create step: Invalid node count",
        "srun: Check SLURM_JOB_ID",
    )
    script = "; ".join(f"echo '{line}' >&2" for line in lines)
    first, _ = exits_of(f"{script}; exit 1")
    assert (first.process, first.code, first.cause) == (0, 1, "srun failed")
    assert first.error == "srun: error: Unable to create step: Invalid node count"


@pytest.mark.parametrize(
    "line",
    ["srun: fatal: SLURM_MEM_PER_CPU and SLURM_MEM_PER_NODE are", "srun: unrecognized option '--bogus'"],
)
def test_srun_that_would_refuse_again_is_a_mistake_of_the_user(exits_of, line):
    first, _ = exits_of(f'echo "{line}" >&2; exit 1')
    assert (first.code, first.cause, first.error) == (2, "srun failed", line)


@pytest.mark.parametrize(
    "down",
    [
        "srun: error: Unable to confirm allocation for job 12: Unable to contact slurm controller",
        # It ended while it was asked.
        "srun: error: Unable to create step for job 12: Zero Bytes were transmitted or received",
    ],
)
def test_srun_waits_for_a_controller_that_is_down(exits_of, tmp_path, down):
    busy = "srun: error: Unable to create step for job 12: Requested nodes are busy"
    calls = tmp_path / "calls"
    script = f"""
echo "$1" >>{calls}
case $(wc -l <{calls}) in
1) echo '{down}' >&2; exit 1 ;;
2) echo '{busy}' >&2; exit 1 ;;
esac
echo '{{"process": 0, "host": "n1", "step": "12.0", "exit": 0, "error": ""}}'
echo '{{"process": 1, "host": "n2", "step": "12.0", "exit": 0, "error": ""}}'
"""
    assert exits_of(script) == [Exit(0, 0, "n1"), Exit(1, 0, "n2")]
    assert len(calls.read_text().splitlines()) == 3


def test_stop_between_two_tries_of_srun_reaches_the_hosts(fake_command, planned, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    run = RunDirectory(tmp_path / "runs" / "quickstart")
    run.attempts.begin({})
    fake_command(
        "srun",
        f"""
[ -e {tmp_path}/called ] || {{ touch {tmp_path}/called; echo 'srun: error: Unable to contact slurm controller' >&2; exit 1; }}
read -r command
echo '{{"process": 0, "host": "n1", "step": "12.0", "exit": 75, "error": "'$command'"}}'
""",
    )
    made, gangs = threading.Event(), []

    def stop_meanwhile(seconds: float) -> None:
        made.wait()
        gangs[0].request_stop()

    monkeypatch.setattr("launcher.backends.srun.time.sleep", stop_meanwhile)
    gangs.append(SrunGang(replace(planned(), hosts=1, processes=1, run_directory=str(run.path)), run, 1))
    made.set()
    deadline, exits = time.monotonic() + 60, []
    while not exits:
        exits = gangs[0].poll(0.1)
        if time.monotonic() > deadline:
            gangs[0].kill()
            pytest.fail("the hosts were not told")
    assert exits == [Exit(0, 75, "n1", "", "stop")]


def test_process_that_ran_out_of_memory_is_told_so(exits_of):
    first, _ = exits_of("echo 'srun: error: n2: task 1: Out Of Memory' >&2; exit 1")
    assert (first.process, first.code, first.host, first.cause) == (1, -9, "n2", "out of memory")


def test_srun_gets_no_options_from_around_the_job(exits_of, monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_LABELIO", "1")
    exits_of(f"env >{tmp_path}/environment; exit 1")
    names = {line.partition("=")[0] for line in (tmp_path / "environment").read_text().splitlines()}
    assert {name for name in names if name.startswith("SLURM_")} == {"SLURM_JOB_ID", "SLURM_JOB_NODELIST"}


def test_job_of_a_launcher_that_was_killed_is_found_from_the_folder_of_the_root(
    fake_command, tmp_path, monkeypatch
):
    path = tmp_path / "runs" / "mine"
    run = RunDirectory(path)
    run.begin_launch(None)
    (path / "job.sbatch").touch()
    fake_command(
        "squeue", f'case "$*" in *%i*) echo "7 {path}/job.sbatch" ;; *) echo "PENDING|None|N/A|" ;; esac'
    )
    monkeypatch.chdir(tmp_path)
    assert slurm.state(RunDirectory(Path("runs/mine"))) == State("queued", "job 7")


@pytest.fixture
def failed_twice(fake_command, planned, tmp_path, monkeypatch):
    """Whether a job of two nodes may restart, of which n2 has failed twice; and the run, for what is done then."""
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1,n2")
    fake_command("squeue", "echo UNLIMITED")
    run = RunDirectory(tmp_path / "runs" / "quickstart")
    plan = replace(planned(), hosts=2, run_directory=str(run.path))
    run.begin_launch("12")
    for attempt in (1, 2):
        run.attempts.append({"attempt": attempt, "failure": {"host": "n2", "cause": "SIGKILL"}})

    def failed_twice(nodes: str, job: str = "") -> tuple[bool, RunDirectory]:
        fields = (
            f"JobId=12 {job} BatchFlag=1 Partition=main Features=(null)"  # the first of two fields counts
        )
        fake_command("scontrol", f'[ "$2" = hostnames ] && echo $3 | tr , " " || echo "{fields}"')
        fake_command("sinfo", f"printf '{nodes}'")
        return slurm.can_restart(plan, run), run

    return failed_twice


@pytest.mark.parametrize(
    ("nodes", "job", "excluded"),
    [
        ("n1|mixed|a|8|4000|gpu:2\\nn2|mixed|a|8|4000|gpu:2\\nn3|idle|a|8|4000|gpu:2\\n", "", ["n2"]),
        ("n1|mixed|a|8|4000|gpu:2\\nn2|mixed|a|8|4000|gpu:2\\n", "", []),
        ("n1|mixed|a|8|4000|gpu:2\\nn2|mixed|a|8|4000|gpu:2\\nn3|down*|a|8|4000|gpu:2\\n", "", []),
        ("n1|mixed|a|8|4000|gpu:2\\nn2|mixed|a|8|4000|gpu:2\\nn3|drained|a|8|4000|gpu:2\\n", "", []),
        (
            "n1|mixed|a|8|4000|gpu:2\\nn2|mixed|a|8|4000|gpu:2\\nn3|idle|a|8|4000|gpu:2\\n",
            "ExcNodeList=n3",
            [],
        ),
        (
            "n1|mixed|a|8|4000|gpu:2\\nn2|mixed|a|8|4000|gpu:2\\nn3|idle|a|8|4000|gpu:2\\n",
            "ReqNodeList=n1,n2",
            [],
        ),
        ("n1|mixed|a|8|4000|gpu:2\\nn2|mixed|a|8|4000|gpu:2\\nn3|idle|b|8|4000|gpu:2\\n", "Features=a", []),
        (
            "n1|mixed|a,b|8|4000|gpu:2\\nn2|mixed|a|8|4000|gpu:2\\nn3|idle|b,a|8|4000|gpu:2\\n",
            "Features=a&b",
            ["n2"],
        ),
        ("n1|mixed|a|8|4000|gpu:2\\nn2|mixed|a|8|4000|gpu:2\\nn3|idle|a|8|4000|gpu:2\\n", "BatchFlag=0", []),
        (
            "n1|mixed|a|8|4000|gpu:2\\nn2|mixed|a|8|4000|gpu:2(S:0)\\nn3|idle|a|16|4000|gpu:2(S:1)\\n",
            "",
            ["n2"],
        ),
        # Of another kind, as in a partition of all nodes.
        ("n1|mixed|a|8|4000|gpu:2\\nn2|mixed|a|8|4000|gpu:2\\nn3|idle|a|8|4000|(null)\\n", "", []),
        ("n1|mixed|a|8|4000|gpu:2\\nn2|mixed|a|8|4000|gpu:2\\nn3|idle|a|4|4000|gpu:2\\n", "", []),
        ("n1|mixed|a|8|4000|gpu:2\\nn2|mixed|a|8|4000|gpu:2\\nn3|idle|a|8|2000|gpu:2\\n", "", []),
    ],
)
def test_node_is_excluded_only_where_enough_others_are_left(failed_twice, nodes, job, excluded):
    can_restart, run = failed_twice(nodes, job)
    assert (run.job.bad_nodes(), run.job.excluded_nodes()) == (["n2"], excluded)
    assert can_restart == (not excluded)


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
