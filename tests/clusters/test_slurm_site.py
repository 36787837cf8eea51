"""Runs on a SLURM as sites have it, by the stub: see SITE_LAYOUT of slurm.py.

It has accounting, a wrapped sbatch, nodes whose names do not resolve, and a shell full of SLURM's variables.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.clusters.runs import LAUNCH, STEPS, Command, Run, wait_until
from tests.clusters.slurm import SITE_NODES, Slurm

pytestmark = pytest.mark.cluster

PAIR, SINGLE = "slurm-2x0", "slurm-1x0"
FIRST, SECOND = SITE_NODES
SCRIPT = Path(__file__).parents[2] / "deploy" / "slurm" / "train.sbatch"
# Of a profile that sets defaults, and of a notebook that runs in a job of its own.
SHELL = {
    "SBATCH_PARTITION": "nowhere", "SBATCH_TIMELIMIT": "1", "SBATCH_ARRAY_INX": "0-3", "SBATCH_NO_REQUEUE": "1",
    "SBATCH_MEM_PER_CPU": "1", "SBATCH_EXPORT": "NONE", "SBATCH_OUTPUT": "/nowhere/%j",
    "SLURM_LABELIO": "1", "SLURM_MEM_PER_CPU": "100", "SLURM_MEM_PER_NODE": "100", "SLURM_UNBUFFEREDIO": "1",
    "SLURM_STDOUTMODE": "none", "SLURM_HINT": "nomultithread", "SLURM_CPU_BIND": "mask_cpu:0x8", "SLURM_NTASKS": "7",
    "SLURM_GPUS_PER_NODE": "2", "SLURM_EXPORT_ENV": "NONE", "SLURM_TIME_FORMAT": "relative", "SLURM_NNODES": "7",
    "SLURM_ARRAY_JOB_ID": "99", "SLURM_ARRAY_TASK_ID": "1", "SLURM_HET_SIZE": "2", "SLURM_JOB_ID": "98",
    "SRUN_CPUS_PER_TASK": "9", "SQUEUE_FORMAT": "%u", "SQUEUE_PARTITION": "urgent", "SQUEUE_STATES": "FAILED",
    "SINFO_FORMAT": "%u", "SINFO_PARTITION": "nowhere", "SCANCEL_INTERACTIVE": "1", "SCANCEL_STATE": "PENDING",
}  # fmt: skip


@pytest.fixture
def site(raised_site: Slurm) -> Iterator[Slurm]:
    """The cluster, idle before and after the test."""
    yield raised_site
    (raised_site.folder / "hold").unlink(missing_ok=True)
    raised_site.run("scancel", "--user=root")
    raised_site.wait_until_idle()


@pytest.fixture
def run(site: Slurm, make_run: Callable[..., Run]) -> Run:
    """A run of the tiny recipe, about to be launched on the login node."""
    return make_run(environment=os.environ | site.environment)


def text_of(command: Command, code: int = 0) -> str:
    assert command.wait() == code, command.text
    return command.text


def job(run: Run) -> str:
    return (run.path / "job").read_text()


def field(site: Slurm, job: str, wanted: str) -> str:
    return site.run("squeue", "--noheader", f"--jobs={job}", f"--format={wanted}", check=False).strip()


def own_cluster(run: Run, settings: dict[str, object]) -> None:
    """Define the cluster `own` in the user's own clusters.yaml."""
    file = run.folder / "config" / "podlaunch" / "clusters.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"own": settings}))  # which is YAML, too
    run.environment = run.environment | {"XDG_CONFIG_HOME": str(run.folder / "config")}


def wait_until_over(site: Slurm, run: Run) -> None:
    """Until SLURM has ended the job, of which a follower would take half a minute to hear."""
    wait_until(
        lambda: not site.run("squeue", "--noheader", f"--jobs={job(run)}", check=False).strip(), "it ends"
    )


def by_hand(site: Slurm, run: Run, *options: str, arguments: tuple[str, ...] = ()) -> str:
    """Submit deploy/slurm/train.sbatch; the job's id."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    printed = site.run(
        "/usr/bin/sbatch", "--parsable", "--gpus-per-node=0", f"--export=ALL,PATH={path}", *options,
        str(SCRIPT), *run.arguments(*arguments, cluster=None), environment=run.environment,
    )  # fmt: skip
    return printed.strip()


# Environments


def test_variables_of_the_shell_reach_neither_job_nor_step(site, run):
    run.environment = run.environment | SHELL
    run.hold_at(3)
    launched = run.launch(cluster=PAIR)
    run.wait_for_step(3)
    assert field(site, job(run), "%P %l %F") == f"main 1:00:00 {job(run)}"
    status = text_of(run.command("status"))
    assert "tiny (running)" in status
    run.let_go()
    text = text_of(launched)
    told = re.search(
        r"^not used +(.+) of your environment: say what you need with --sbatch", text, re.MULTILINE
    )
    assert told[1].split(", ") == sorted(name for name in SHELL if name.startswith("SBATCH_"))
    assert re.search(rf"^job +{job(run)}$", text, re.MULTILINE)  # and not a number of the site's banner
    (attempt,) = run.attempts()
    # By the names that SLURM has for them, although they call themselves otherwise.
    assert (attempt["verdict"], attempt["hosts"]) == ("completed", sorted(SITE_NODES))
    assert run.report()["step"] == STEPS


def test_step_of_a_job_by_hand_gets_no_options_from_around_it(site, run):
    # A script that was submitted from within another job, which is how such variables come into a job.
    run.environment = run.environment | {
        k: v for k, v in SHELL.items() if re.match("SLURM_(LABEL|MEM|CPU|STD|NT|ARRAY|HET)", k)
    }
    submitted = by_hand(site, run, "--nodes=2", f"--output={run.folder}/hand.log")
    wait_until((run.path / "hosts" / "0.json").exists, "it begins")
    assert f"completed   step {STEPS}" in text_of(run.command("attach"))
    assert job(run) == submitted


# Jobs of other kinds


def test_tasks_of_an_array_do_not_interfere(site, run):
    run.hold_at(3)
    root = run.root
    array = site.run(
        "/usr/bin/sbatch", "--parsable", "--array=0-1", "--nodes=1", "--requeue", "--open-mode=append",
        f"--output={run.folder}/%a.log", "--wrap",
        f"exec {subprocess.list2cmdline(LAUNCH)} run --requeue {run.recipe} --root {root} --name task$SLURM_ARRAY_TASK_ID",
        environment=run.environment,
    ).strip()  # fmt: skip
    tasks = [root / "task0", root / "task1"]

    def attempts(path: Path) -> str:
        file = path / "attempts.jsonl"
        return file.read_text() if file.exists() else ""

    def is_training(path: Path) -> bool:
        report = path / "hosts" / "0.json"
        return report.exists() and '"step": 3' in report.read_text()

    wait_until(lambda: all(map(is_training, tasks)), "both train")
    assert [(path / "job").read_text() for path in tasks] == [f"{array}_0", f"{array}_1"]
    site.run("scancel", "--signal=TERM", f"{array}_1")  # the one whose own id is that of the array
    wait_until(lambda: attempts(tasks[1]), "the signalled one has saved")
    wait_until(lambda: f"job {array}_1 is requeued" in (run.folder / "1.log").read_text(), "it is requeued")
    assert attempts(tasks[0]) == ""
    assert field(site, f"{array}_0", "%T") == "RUNNING"
    run.let_go()
    wait_until(lambda: all((path / "result.json").exists() for path in tasks), "both end")
    wait_until(lambda: '"restart_count": 1' in attempts(tasks[1]), "it goes on in the array's task")
    assert '"restart_count": 0' in attempts(tasks[0])


def test_heterogeneous_job_is_refused_in_words(site, run):
    output = run.folder / "output.txt"
    command = subprocess.list2cmdline([*LAUNCH, *run.arguments(cluster=None)])
    site.run(
        "/usr/bin/sbatch", "--wait", "--nodes=1", f"--output={output}", f"--wrap={command}", ":", "--nodes=1",
        check=False, environment=run.environment,
    )  # fmt: skip
    assert (
        "error: this is a heterogeneous job of 2 components, which podlaunch cannot use;"
        in output.read_text()
    )
    assert not run.root.exists()


def test_job_larger_than_the_partition_allows_is_refused(site, run):
    # sbatch would accept it, and it would stay in the queue.
    text = text_of(run.launch("--sbatch", "partition=urgent", cluster=PAIR), code=2)
    assert "2 nodes, but a job of partition urgent may have 1; ask for that at most" in text
    assert not run.path.exists()


# The controller


def test_controller_that_is_down_costs_no_restart(site, run):
    begun, go_on = run.folder / "begun", run.folder / "go-on"
    wait = f"touch {begun}; while [ ! -e {go_on} ]; do sleep 0.05; done"
    own_cluster(run, {"nodes": 2, "setup": [wait]})
    launched = run.launch("--max-restarts", "0", cluster="own")
    run.wait_until(begun.exists, "the job begins")
    site.stop_controller()
    try:
        go_on.touch()
        log = run.path / "logs" / "attempt-1" / "srun.log"
        told = "Unable to contact slurm controller"
        run.wait_until(lambda: log.exists() and told in log.read_text(), "srun gives up")
    finally:
        site.start_controller()
    text_of(launched)
    (attempt,) = run.attempts()
    assert attempt["verdict"] == "completed"


def test_srun_that_cannot_start_is_named_with_its_own_words_and_not_tried_again(site, run):
    own_cluster(run, {"nodes": 1, "srun": {"no-such-option": True}})
    text = text_of(run.launch(cluster="own"), code=2)
    assert "srun failed, so that no process was started: srun: unrecognized option '--no-such-option'" in text
    assert len(run.attempts()) == 1


# Nodes


def test_node_without_a_spare_one_is_tried_again(site, run):
    run.hold_at(3)
    launched = run.launch(cluster=PAIR)
    for attempt in (1, 2):
        run.wait_for_step(3, attempt=attempt)
        run.kill_workers(1)
        run.wait_until(lambda n=attempt: len(run.attempts()) == n, "it fails")
    run.wait_for_step(3, attempt=3)
    run.wait_until(
        lambda: "failed twice and tried again, since no other nodes are left" in launched.text, "it is told"
    )
    assert (
        f"nodes       failed twice and tried again, since no other nodes are left for the job: {SECOND}"
        in text_of(run.command("status"))
    )
    run.let_go()
    text_of(launched)
    last = run.attempts()[-1]
    assert (last["verdict"], last["restart_count"], last["job"]) == ("completed", 0, job(run))


def test_directory_that_one_node_may_only_read_is_told_at_once(site, run):
    run.root.mkdir()
    site.on_node(SECOND, "mount", "--bind", str(run.root), str(run.root))
    site.on_node(SECOND, "mount", "-o", "remount,ro,bind", str(run.root))
    try:
        text = text_of(run.launch(cluster=PAIR), code=2)
    finally:
        site.on_node(SECOND, "umount", str(run.root))
    assert f"run directory {run.path} cannot be written on {SECOND}: Read-only file system" in text
    assert run.attempts()[0]["failure"]["process"] == 1


def test_full_disk_is_named_by_the_follower(site, run):
    run.root = site.small_disk / "runs"
    run.path = run.root / "tiny"
    text_of(run.launch("--detach", "--sbatch", "hold", cluster=SINGLE))
    filler = site.small_disk / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(2**21))
    try:
        site.run("scontrol", "release", job(run))
        wait_until_over(site, run)
        assert f"the disk of {run.path} is full" in text_of(run.command("attach"), code=1)
    finally:
        filler.unlink()


def test_last_words_of_a_job_without_a_result_are_shown(site, run):
    own_cluster(run, {"nodes": 1, "setup": ["echo module not found", "exit 3"]})
    text_of(run.launch("--detach", cluster="own"))
    wait_until_over(site, run)
    text = text_of(run.command("attach"), code=1)
    assert f"run tiny is interrupted: job {job(run)} is FAILED, NonZeroExitCode" in text
    assert "            | module not found\n" in text
    # Also when squeue has forgotten the job, which the accounts have not.
    wait_until(lambda: "FAILED" in site.run("sacct", "--jobs", job(run), "--format=State"), "it is accounted")
    forgetful = run.folder / "programs" / "squeue"
    forgetful.parent.mkdir()
    forgetful.write_text("#!/bin/sh\n")
    forgetful.chmod(0o755)
    run.environment = run.environment | {"PATH": f"{forgetful.parent}:{run.environment['PATH']}"}
    status = text_of(run.command("status"))
    assert f"tiny (interrupted: job {job(run)} is FAILED" in status
    assert "            | module not found\n" in status


# The launcher


def test_killed_before_it_knew_the_job_the_run_is_found_by_its_script(site, run):
    hold = site.folder / "hold"
    hold.touch()  # sbatch has submitted, and does not return
    launched = run.launch("--sbatch", "hold", cluster=SINGLE)
    submitted = lambda: site.run("squeue", "--noheader", "--format=%i").strip()  # noqa: E731
    run.wait_until(submitted, "it is submitted")
    launched.process.send_signal(signal.SIGKILL)
    launched.process.wait()
    hold.unlink()
    assert f"tiny (queued: job {submitted()}, JobHeldUser)" in text_of(run.command("status"))
    assert "run tiny is queued in job" in text_of(run.launch(cluster=SINGLE), code=2)
    site.run("scontrol", "release", submitted())
    assert f"completed   step {STEPS}" in text_of(run.command("attach"))
