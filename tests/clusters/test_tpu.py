"""Runs on Cloud TPU, from a laptop to a slice and back; see cloud.py for what stands for Google's part.

The first two train; in the others the stub does.
"""

import signal
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest

import configs
from tests.clusters.cloud import ONE_VM, SHORT, STEPS, Cloud, CloudRun
from tests.clusters.runs import SAVE_EVERY, Run

pytestmark = pytest.mark.cluster

QUICKSTART = Path(configs.__file__).with_name("quickstart.yaml")
NO_CAPACITY = "There is no more capacity in the zone"
Make = Callable[..., CloudRun]


@pytest.fixture
def run(cloud_run: CloudRun) -> CloudRun:
    return cloud_run


def test_quickstart_on_four_vms_from_creation_to_deletion(make_cloud_run: Make, cloud: Cloud) -> None:
    run = make_cloud_run(QUICKSTART, stub=False)
    launched = run.launch(
        "model.name=resnet4", "train.steps=6", "schedule.warmup_epochs=0", cluster="tpu-v4-32"
    )
    assert launched.wait() == 0, launched.text
    assert "16 chips, 16 chip-hours ($51.52) an hour" in launched.text
    result = run.result()
    assert (result["status"], result["step"]) == ("completed", 6)
    (attempt,) = run.attempts()
    assert attempt["hosts"] == ["t0", "t1", "t2", "t3"]
    assert attempt["start_seconds"].keys() == {"hosts", "ssh", "copy", "environment", "checks", "start"}
    assert all("completed" in run.report(process)["phase"] for process in range(4))
    assert cloud.nothing_is_left
    assert not any(cloud.vms.pids(k) for k in range(4))
    assert cloud.api.rejected == []


def test_a_preempted_slice_is_created_anew_and_the_run_ends_with_the_same_bits(
    cloud_training: CloudRun, cloud: Cloud, undisturbed_training: Run
) -> None:
    run = cloud_training
    launched = run.launch(SHORT)
    run.wait_until(run.checkpoint_steps, "a checkpoint")
    run.freeze(0, 1)
    run.wait_for_step(1)  # it is told of some seconds later
    kept = run.checkpoint_steps()[-1]
    cloud.api.creation_fails(NO_CAPACITY)
    cloud.api.preempt(run.node())
    assert launched.wait() == 0, launched.text
    assert f"queued resource FAILED: {NO_CAPACITY}; request 2 goes out in" in launched.text
    first, second = run.attempts()
    assert (first["verdict"], first["failure"]["cause"]) == ("preempted", "preempted")
    assert SAVE_EVERY <= kept == first["kept_step"] == second["from_step"] < STEPS
    run.download()
    run.assert_same_bits(undisturbed_training, STEPS)
    assert cloud.nothing_is_left


def test_logs_ssh_stop_and_list_from_another_terminal(run: CloudRun, cloud: Cloud) -> None:
    launched = run.launch("train.steps=100000")
    run.wait_for_step(2)
    listed, shown = run.command("list"), run.command("logs")
    assert (listed.wait(), shown.wait()) == (0, 0)
    assert "running" in listed.text
    assert "[host 1] " in shown.text
    there = run.command("ssh", "--host", "1", "tiny", "uname", "-n")
    assert there.wait() == 0, there.text
    assert there.text.strip() == f"t{run.machines()[1]}"
    refused = run.launch("train.steps=100000")
    assert refused.wait() == 2
    assert "is running already" in refused.text
    stop = run.command("stop")
    assert stop.wait() == 0, stop.text
    assert launched.wait() == 130, launched.text
    assert run.checkpoint_steps()[-1] == run.result()["step"] > 0
    assert cloud.nothing_is_left


def test_a_run_that_waits_in_the_queue_is_stopped_there(run: CloudRun, cloud: Cloud) -> None:
    cloud.api.hold = True
    launched = run.launch(SHORT)
    run.wait_until(lambda: "WAITING_FOR_RESOURCES" in launched.text, "it waits")
    status = run.command("status")
    assert status.wait() == 0
    assert "queued" in status.text
    stop = run.command("stop")
    assert stop.wait() == 0, stop.text
    assert launched.wait() == 130, launched.text
    assert run.result()["status"] == "stopped"
    assert cloud.nothing_is_left


def test_two_runs_at_once_have_a_slice_each(run: CloudRun, make_cloud_run: Make, cloud: Cloud) -> None:
    other = make_cloud_run()
    launched = [r.launch("train.steps=4", cluster=ONE_VM) for r in (run, other)]
    assert [each.wait() for each in launched] == [0, 0], launched[0].text + launched[1].text
    hosts = [set(r.attempts()[0]["hosts"]) for r in (run, other)]
    assert len(hosts[0] | hosts[1]) == 2
    assert cloud.nothing_is_left


def test_kept_hosts_get_what_changed_and_nothing_else(run: CloudRun, cloud: Cloud) -> None:
    first = run.launch("--keep", "train.steps=2", cluster=ONE_VM)
    assert first.wait() == 0, first.text
    assert "it costs money until" in first.text
    second = run.launch("--keep", "train.steps=4", cluster=ONE_VM)
    assert second.wait() == 0, second.text
    assert "to create" not in second.text
    assert [a["copied_bytes"] > 0 for a in run.attempts()] == [True, False]
    existing = run.launch("--tpu", run.slice(), "train.steps=6", cluster=ONE_VM)
    assert existing.wait() == 0, existing.text
    assert f"left as it was: {run.slice()}" in existing.text
    deleted = run.plain("gc", "--delete", "--yes")
    assert deleted.wait() == 0, deleted.text
    assert cloud.nothing_is_left


def test_secrets_reach_the_workers_and_no_file(run: CloudRun, cloud: Cloud) -> None:
    run.environment["WANDB_API_KEY"] = secret = f"hush-{uuid4().hex}"
    launched = run.launch("--set", "secrets=[WANDB_API_KEY]", "--keep", "train.steps=100000", cluster=ONE_VM)
    run.wait_for_step(1)
    worker = run.workers()[0]
    assert f"WANDB_API_KEY={secret}".encode() in Path(f"/proc/{worker}/environ").read_bytes().split(b"\0")
    commands = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
    assert not any(secret.encode() in command for command in commands)
    launched.process.send_signal(signal.SIGINT)
    assert launched.wait() == 130, launched.text
    for k in run.machines():
        for file in cloud.vms.home(k).rglob("*"):
            assert not file.is_file() or secret.encode() not in file.read_bytes(), file
    for name, content in cloud.storage.contents(run.prefix).items():
        assert secret.encode() not in content, name
    assert secret not in launched.text
    cloud.delete(run.slice())


def test_launch_worker_on_each_vm_joins_by_itself(run: CloudRun, cloud: Cloud, undisturbed: Run) -> None:
    """As `gcloud compute tpus tpu-vm ssh … --worker=all --command "launch worker …"` does."""
    machines = cloud.give("v4-16")
    workers = [run.on_vm(k, "worker", str(run.recipe), "--root", run.root_place, SHORT) for k in machines]
    assert [worker.wait() for worker in workers] == [0, 0], workers[0].text + workers[1].text
    assert run.result()["status"] == "completed"
    run.download()
    run.assert_same_bits(undisturbed, STEPS)


def test_a_missing_worker_is_named(run: CloudRun, cloud: Cloud) -> None:
    machines = cloud.give("v4-16")
    first = run.on_vm(
        machines[0], "worker", str(run.recipe), "--root", run.root_place, SHORT, LAUNCH_RENDEZVOUS_SECONDS="4"
    )
    assert first.wait() == 2, first.text
    assert f"worker 1 ({cloud.vms.machines[machines[1]].internal_address}) has not come" in first.text
