"""Runs on a real SLURM of four nodes: submitted, followed, killed, cut off, preempted, requeued; see slurm.py.

The first two train; in the others the stub does.
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

from tests.clusters.network import BOOT_ID
from tests.clusters.runs import LAUNCH, SAVE_EVERY, STEPS, Command, Run, wait_until
from tests.clusters.slurm import NODES, Slurm

pytestmark = pytest.mark.cluster

PAIR = "slurm-2x0"
REPOSITORY = Path(__file__).parents[2]
# The quickstart, but for the network: test_quickstart.py has that.
SHORT = ("model.name=resnet4", "train.epochs=1", "schedule.warmup_epochs=0.5")


@pytest.fixture
def slurm(raised_slurm: Slurm) -> Iterator[Slurm]:
    """The cluster, idle before and after the test."""
    yield raised_slurm
    raised_slurm.run("scancel", "--user=root")
    raised_slurm.wait_until_idle()


@pytest.fixture
def run(slurm: Slurm, make_run: Callable[..., Run]) -> Run:
    """A run of the tiny recipe, about to be launched on the login node."""
    return make_run(environment=os.environ | slurm.environment)


def batch_log(run: Run) -> str:
    return "".join(path.read_text() for path in sorted((run.path / "logs").glob("slurm-*.log")))


def job(run: Run) -> str:
    return (run.path / "job").read_text()


def wait_for_job(run: Run) -> str:
    run.wait_until(lambda: (run.path / "job").exists(), "the job is submitted")
    return job(run)


def text_of(command: Command, code: int = 0) -> str:
    assert command.wait() == code, command.text
    return command.text


def host_of(run: Run, process: int) -> int:
    """Process id of the host process that watches a worker."""
    status = Path(f"/proc/{run.workers()[process]}/status").read_text()
    return int(re.search(r"^PPid:\s+(\d+)", status, re.MULTILINE)[1])


def sruns_of(run: Run, attempt: int) -> list[Path]:
    """The processes of the srun that started an attempt."""
    arguments = f"\0{run.path}\0{attempt}\0".encode()
    commands = [p for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
    return [p for p in commands if (c := p.read_bytes()).startswith(b"srun\0") and c.endswith(arguments)]


# What trains


def test_quickstart_trains_on_four_nodes(slurm, make_run):
    recipe = REPOSITORY / "configs" / "quickstart.yaml"
    run = make_run(recipe, os.environ | slurm.environment, stub=False)
    # jax tells hosts apart by their boot ids.
    assert len({slurm.on_node(node, "cat", BOOT_ID) for node in NODES}) == len(NODES)
    text = text_of(run.launch(*SHORT, cluster="slurm-4x0"))
    assert "cluster     slurm-4x0: 4 processes × 1 cpu = 4 devices" in text
    assert re.search(r"^completed +step 23 .* 1 attempt", text, re.MULTILINE)
    (attempt,) = run.attempts()
    assert attempt["hosts"] == list(NODES)
    assert (attempt["job"], attempt["restart_count"]) == (job(run), 0)
    assert run.result()["metrics"]["eval/count"] == 360


def test_killed_it_goes_on_to_the_bits_of_an_uninterrupted_run(slurm, make_run, trained):
    run = make_run(environment=os.environ | slurm.environment, stub=False)
    launched = run.launch(cluster=PAIR)
    run.wait_until(run.checkpoint_steps, "a checkpoint")
    run.kill_workers(1)
    text_of(launched)
    first, second = run.attempts()
    assert (first["failure"]["process"], first["failure"]["host"]) == (1, "n2")
    assert SAVE_EVERY <= first["kept_step"] == second["from_step"] < STEPS
    run.assert_same_bits(trained)


# Ways to begin


def test_batch_script_by_hand_is_the_same_run(slurm, run, uninterrupted):
    submitted = slurm.run(
        "sbatch", "--parsable", "--nodes=2", "--gpus-per-node=0", f"--output={run.folder}/hand.log",
        f"--export=ALL,PATH={Path(sys.executable).parent}:{os.environ['PATH']}",
        str(REPOSITORY / "deploy" / "slurm" / "train.sbatch"), *run.arguments(cluster=None),
        environment=run.environment,
    ).strip()  # fmt: skip
    wait_until((run.path / "hosts" / "0.json").exists, "it begins")
    assert f"completed   step {STEPS}" in text_of(run.command("attach"))
    assert job(run) == submitted
    assert f"completed   step {STEPS}" in (run.folder / "hand.log").read_text()
    run.assert_same_bits(uninterrupted)


def test_worker_in_a_script_of_ones_own_joins_by_itself(slurm, run):
    launch = [*LAUNCH, "worker", *run.arguments("train.steps=4", cluster=None)]
    srun = ["srun", "--nodes=2", "--ntasks=2", "--kill-on-bad-exit=1", *launch]
    slurm.run(*srun, environment=run.environment)
    again = slurm.run(*srun, environment=run.environment)
    assert "run tiny is complete" in again  # and the other task does not wait for what is done
    (attempt,) = run.attempts()
    assert (attempt["verdict"], attempt["hosts"]) == ("completed", ["n1", "n2"])
    assert run.result()["step"] == 4


def test_two_jobs_share_nodes(slurm, run, make_run):
    other = make_run(environment=run.environment)
    where = ("--sbatch", "nodelist=n1,n2", "train.steps=12")
    launched = [r.launch(*where, cluster=PAIR) for r in (run, other)]
    assert [text_of(command) and 0 for command in launched] == [0, 0]
    ports = set()
    for r in (run, other):
        assert r.attempts()[0]["hosts"] == ["n1", "n2"]
        (rendezvous,) = r.path.glob("logs/rendezvous-*")
        ports.add(json.loads(rendezvous.read_text())[1])
    assert len(ports) == 2
    assert {port.partition(":")[0] for port in ports} == {slurm.hosts["n1"].address}


# A name with everything that a shell, sbatch or srun could take for its own.
ODD = "-a b'c\"d$HOME`id`;e&%j%%\n#f*é"


def test_odd_directories_and_arguments_arrive_unharmed(slurm, run):
    run.root = run.folder / ODD / "runs"
    run.path = run.root / "tiny"
    events = f"{run.folder}/{ODD}/events"
    text = text_of(run.launch("train.steps=1", f"log.tensorboard={json.dumps(events)}", cluster=PAIR))
    assert "completed   step 1 " in text
    assert list(Path(events).iterdir())
    assert "completed" in batch_log(run)
    assert "tiny (completed)" in text_of(run.command("status"))


# What is seen, from another terminal


def test_job_outlives_its_launcher_and_is_seen_followed_and_stopped_from_elsewhere(slurm, run):
    launched = run.launch("train.steps=100000", cluster=PAIR)
    run.wait_for_step(10)
    launched.process.kill()
    status = text_of(run.command("status"))
    assert "tiny (running)" in status
    assert re.search(r"^progress +step \d+/100000 .*images/s", status, re.MULTILINE)
    assert re.search(
        r"^tiny +running +step \d+/100000 +slurm-2x0$", text_of(run.command("list")), re.MULTILINE
    )
    refused = text_of(run.launch("train.steps=100000", cluster=PAIR), code=2)
    assert f"error: run tiny is running in job {job(run)}:" in refused
    both = text_of(run.command("logs")).splitlines()
    assert {line.split("]")[0] for line in both} == {"[host 0", "[host 1"}
    attached, follow = run.command("attach"), run.command("logs", "-f", "--host", "1")
    run.wait_until(lambda: "images/s" in attached.text, "the progress is shown")
    os.kill(attached.process.pid, signal.SIGINT)
    assert "left running" in text_of(attached, code=130)
    attached = run.command("attach")
    assert "run tiny is stopped" in text_of(run.command("stop"))
    assert re.search(r"^stopped +step \d+", text_of(attached, code=130), re.MULTILINE)
    assert text_of(follow) != ""
    assert run.attempts()[-1]["verdict"] == "stopped"
    assert run.attempts()[-1]["steps_lost"] == 0


def test_job_that_waits_says_why_and_is_stopped_in_the_queue(slurm, run):
    slurm.run("sbatch", "--nodes=4", "--exclusive", "--time=10", "--output=/dev/null", "--wrap=sleep 600")
    launched = run.launch("--sbatch", "time=20", cluster=PAIR)
    run.wait_until(lambda: "queued: job" in launched.text, "the reason is shown")
    run.wait_until(lambda: "(queued: job" in text_of(run.command("status")), "status")

    def expected() -> bool:
        return bool(re.search(r"Resources, expected to start at \d{4}-", text_of(run.command("status"))))

    wait_until(expected, "SLURM has planned the start")
    assert "run tiny is stopped" in text_of(run.command("stop"))
    assert "stopped     step 0" in text_of(launched, code=130)
    assert job(run) not in slurm.run("squeue", "--noheader", "--format=%i").split()
    assert "tiny (stopped)" in text_of(run.command("status"))


# Failures


def test_killed_task_ends_the_step_and_the_run_goes_on_in_the_allocation(slurm, run, uninterrupted):
    run.hold_at(SAVE_EVERY + 1)
    launched = run.launch(cluster=PAIR)
    for attempt, victim in ((1, 1), (2, 0)):
        run.wait_for_step(attempt * SAVE_EVERY + 1, attempt=attempt)
        gang = run.workers()
        run.freeze(1 - victim)
        # Once the worker, as when memory runs out, once the task that SLURM knows.
        os.kill(gang[victim] if attempt == 1 else host_of(run, victim), signal.SIGKILL)
        run.hold_at((attempt + 1) * SAVE_EVERY + 1)  # of this gang nobody goes on any more
        run.wait_until(lambda gang=gang: run.are_gone(gang), "the step is gone")
    run.let_go()
    text = text_of(launched)
    first, second, third = run.attempts()
    for attempt, victim in ((first, 1), (second, 0)):
        failure = attempt["failure"]
        assert (failure["process"], failure["host"], failure["cause"]) == (
            victim,
            f"n{victim + 1}",
            "SIGKILL",
        )
    assert "process 1 on n2 failed at step" in text
    assert (third["verdict"], third["job"], third["restart_count"]) == ("completed", first["job"], 0)
    run.assert_same_bits(uninterrupted)


def test_node_cut_off_is_named_then_excluded_and_the_run_goes_on_elsewhere(slurm, run):
    run.hold_at(SAVE_EVERY + 1)
    launched = run.launch(cluster=PAIR)
    run.wait_until(run.checkpoint_steps, "a checkpoint")
    slurm.cut_off("n2")
    run.let_go()
    try:
        run.wait_until(lambda: len(run.attempts()) == 1, "n2 is lost")
        assert (
            sruns_of(run, attempt=1) == []
        )  # one would end a step of the next allocation, which has its number
        run.wait_until(lambda: len(run.attempts()) == 2, "it failed twice")
    finally:
        slurm.reconnect("n2")
    text = text_of(launched)
    lost, absent, last = run.attempts()
    assert (lost["failure"]["host"], lost["failure"]["cause"]) == ("n2", "lost")
    assert (absent["failure"]["host"], absent["failure"]["cause"]) == ("n2", "not started")
    assert "nothing was heard of n2" in text
    assert "is requeued, without n2" in batch_log(run)
    assert (last["verdict"], "n2" in last["hosts"]) == ("completed", False)
    assert last["restart_count"] == 1


# Saving in time


def test_time_limit_saves_requeues_and_resumes_to_the_same_bits(slurm, run, uninterrupted):
    own = run.folder / "config" / "podlaunch" / "clusters.yaml"
    own.parent.mkdir(parents=True)
    # SLURM asks for the save up to a minute before the one that is left then, so 30 seconds after the start.
    own.write_text("brief: {nodes: 2, partition: short, time: 2, save_minutes: 1}")
    run.environment = run.environment | {"XDG_CONFIG_HOME": str(run.folder / "config")}
    run.hold_at(SAVE_EVERY + 1)
    launched = run.launch(cluster="brief")
    run.wait_until(run.attempts, "the limit")
    run.let_go()
    text_of(launched)
    first, last = run.attempts()
    assert (first["verdict"], first["steps_lost"]) == ("preempted", 0)
    assert first["kept_step"] == last["from_step"] == SAVE_EVERY + 2
    assert (last["verdict"], last["restart_count"]) == ("completed", 1)
    run.assert_same_bits(uninterrupted)


def test_cancelled_job_is_stopped_not_failed(slurm, run):
    launched = run.launch("train.steps=100000", cluster=PAIR)
    run.wait_for_step(3)
    slurm.run("scancel", job(run))
    assert re.search(r"^stopped +step \d+", text_of(launched, code=130), re.MULTILINE)
    assert (run.attempts()[-1]["verdict"], run.attempts()[-1]["steps_lost"]) == ("stopped", 0)
    assert "tiny (stopped)" in text_of(run.command("status"))


@pytest.mark.parametrize("partition", ["main", "scavenge"])  # a site that requeues, one that cancels
def test_preempted_it_saves_and_goes_on_later(slurm, run, partition):
    run.hold_at(3)
    launched = run.launch(
        "--sbatch", f"partition={partition}", "--sbatch", "exclusive", "train.steps=20", cluster=PAIR
    )
    run.wait_for_step(3)
    slurm.run(
        "sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    )
    run.wait_until(run.attempts, "the first attempt ends")
    run.let_go()
    text_of(launched)
    first, last = run.attempts()
    assert (first["verdict"], first["steps_lost"]) == ("preempted", 0)
    assert (last["verdict"], last["from_step"], last["restart_count"]) == ("completed", first["kept_step"], 1)


def test_without_time_for_another_attempt_a_job_that_may_not_be_requeued_is_submitted_again(slurm, run):
    run.hold_at(SAVE_EVERY + 1)
    launched = run.launch("--sbatch", "no-requeue", "--sbatch", "time=7", "train.steps=20", cluster=PAIR)
    run.wait_until(run.checkpoint_steps, "a checkpoint")
    before = job(run)
    run.kill_workers(1)  # with 7 minutes left: 5 to save, 2 for SLURM to be early
    run.let_go()
    text_of(launched)
    first, last = run.attempts()
    assert (first["job"], first["verdict"]) == (before, "failed")
    assert (last["job"], last["verdict"]) == (job(run), "completed")
    assert last["job"] != before


def test_job_too_short_to_save_is_refused_in_it(slurm, run):
    output = run.folder / "output.txt"
    command = subprocess.list2cmdline([*LAUNCH, *run.arguments(cluster=None)])
    slurm.run(
        "sbatch", "--wait", "--nodes=2", "--time=3", f"--output={output}", f"--wrap={command}", check=False
    )
    assert "the time limit of job" in output.read_text()
    assert not run.root.exists()


# Refused


@pytest.mark.parametrize(
    ("cluster_name", "options", "told"),
    [
        (PAIR, ["partition=gold"], "SLURM refuses the job: invalid partition specified: gold; Batch job"),
        (PAIR, ["constraint=a100"], "SLURM refuses the job: Batch job submission failed: Invalid feature"),
        (PAIR, ["bogus=3"], "SLURM refuses the job: unrecognized option '--bogus=3'"),
        ("slurm-9x0", [], "9 nodes, but partition main has 4"),
        ("slurm-2x3", [], "Requested node configuration is not available"),
        (PAIR, ["partition=short", "time=10"], "time = 10 is above the limit of partition short, 2:00"),
        (PAIR, ["partition=short"], "partition short gives a job 2 minutes, not above save_minutes = 5"),
    ],
)
def test_what_slurm_would_not_run_is_refused_and_leaves_nothing(slurm, run, cluster_name, options, told):
    arguments = [word for option in options for word in ("--sbatch", option)]
    text = text_of(
        run.launch("train.batch_size=72", "model.batch_norm=global", *arguments, cluster=cluster_name), code=2
    )
    assert text.count("\nerror: ") == 1
    assert told in text
    assert not run.root.exists()
    assert slurm.run("squeue", "--noheader") == ""


def test_without_sbatch_it_says_where_to_type_it(slurm, run):
    run.environment = run.environment | {"PATH": "/nowhere"}
    text = text_of(run.launch(cluster=PAIR), code=2)
    assert "there is no sbatch on this machine; type this on a login node" in text
    assert not run.root.exists()


def test_run_directory_that_a_node_does_not_see_is_told_with_its_name(slurm, run):
    # The folder that is a disk of each node's own: n1 gets the directory, n2 does not have it.
    run.root = slurm.local_disk
    script = [*LAUNCH, *run.arguments("train.steps=1", cluster=None)]
    output = run.folder / "output.txt"
    slurm.run(
        "sbatch", "--wait", "--nodes=2", "--nodelist=n1,n2", f"--output={output}", "--wrap",
        subprocess.list2cmdline(script), check=False, environment=run.environment,
    )  # fmt: skip
    text = output.read_text()
    assert "process 1 on n2 failed (exit code 2)" in text
    assert f"run directory {run.root / 'tiny'} is not visible on n2" in text


def test_node_with_other_code_is_told_before_training(slurm, run):
    plan = REPOSITORY / "launcher" / "plan.py"
    other = run.folder / "plan.py"
    other.write_text(plan.read_text() + "# another version\n")
    slurm.on_node("n2", "mount", "--bind", str(other), str(plan))
    try:
        text = text_of(run.launch(cluster=PAIR), code=2)
    finally:
        slurm.on_node("n2", "umount", str(plan))
    assert re.search(
        r"process 1 on n2 failed \(exit code 2\): n2 differs from the machine that planned this run: code",
        text,
    )
    assert run.checkpoint_steps() == []


def test_gpus_that_are_not_there_are_missed_before_training(slurm, run):
    text = text_of(run.launch("train.batch_size=64", cluster="slurm-2x2"), code=2)
    assert re.search(r"n[12] shows 0 GPUs to process [01]; the plan for cluster \"slurm-2x2\" has 2", text)
