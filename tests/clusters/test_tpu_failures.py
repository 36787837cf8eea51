"""What befalls runs on Cloud TPU: their VMs are taken away or broken, launchers killed and laptops closed. By the stub."""

import signal
from collections.abc import Callable

import pytest

from tests.clusters.cloud import ONE_VM, SHORT, STEPS, Cloud, CloudRun
from tests.clusters.runs import SAVE_EVERY, Run, wait_until

pytestmark = pytest.mark.cluster
Make = Callable[..., CloudRun]


@pytest.fixture
def run(cloud_run: CloudRun) -> CloudRun:
    return cloud_run


def test_a_notice_of_maintenance_saves_first(run: CloudRun, cloud: Cloud) -> None:
    run.hold_at(3)
    launched = run.launch(SHORT, "checkpoint.every_steps=1000")
    run.wait_for_step(3)
    (_, other) = run.machines()
    cloud.vms.set_metadata(other, "instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")
    run.wait_until(lambda: run.attempts(), "the first attempt ends")
    cloud.vms.set_metadata(other, "instance/maintenance-event", "NONE")
    run.let_go()
    assert launched.wait() == 0, launched.text
    first, second = run.attempts()
    assert (first["verdict"], first["failure"], first["steps_lost"]) == ("preempted", None, 0)
    assert second["from_step"] == first["reached_step"] == 4


def test_a_killed_worker_is_the_cause_and_its_hosts_are_used_again(
    run: CloudRun, cloud: Cloud, undisturbed: Run
) -> None:
    before = cloud.creations()
    run.hold_at(SAVE_EVERY + 2)
    launched = run.launch(SHORT)
    run.wait_for_step(SAVE_EVERY + 2)
    run.kill_workers(1)
    run.let_go()
    assert launched.wait() == 0, launched.text
    first, second = run.attempts()
    assert (first["kept_step"], first["steps_lost"], second["from_step"]) == (SAVE_EVERY, 2, SAVE_EVERY)
    host = first["hosts"][1]
    assert (first["failure"]["process"], first["failure"]["host"]) == (1, host)
    assert first["failure"]["cause"] == "SIGKILL"
    assert f"process 1 on {host} failed" in launched.text
    assert cloud.creations() == before + 1
    run.download()
    run.assert_same_bits(undisturbed, STEPS)


def test_a_killed_launcher_leaves_a_run_that_another_laptop_goes_on_with(
    run: CloudRun, make_cloud_run: Make, cloud: Cloud, undisturbed: Run
) -> None:
    run.hold_at(2)
    launched = run.launch(SHORT)
    run.wait_for_step(2)
    launched.process.kill()
    launched.process.wait()
    other = make_cloud_run(like=run)
    attached = other.command("attach", "--yes", run.name)
    other.wait_until(lambda: "step 2/" in attached.text, "it is followed")
    run.let_go()
    assert attached.wait() == 0, attached.text
    (attempt,) = run.attempts()
    assert (attempt["verdict"], attempt["from_step"], attempt["reached_step"]) == ("completed", 0, STEPS)
    run.download()
    run.assert_same_bits(undisturbed, STEPS)
    assert cloud.nothing_is_left


def test_a_closed_laptop_leaves_it_running_to_its_end(run: CloudRun, cloud: Cloud) -> None:
    run.hold_at(2)
    launched = run.launch(SHORT, cluster=ONE_VM)
    run.wait_for_step(2)
    launched.process.send_signal(signal.SIGHUP)
    assert launched.wait() == 75
    assert "launch attach tiny" in launched.text
    status = run.command("status")
    assert status.wait() == 0
    assert "no launcher looks after it" in status.text
    run.let_go()
    wait_until(lambda: run.report().get("phase") == "completed", "the workers train without a launcher")
    attached = run.command("attach")
    assert attached.wait() == 0, attached.text
    assert run.result()["status"] == "completed"
    assert cloud.nothing_is_left


def test_a_launcher_killed_in_the_queue_leaves_what_gc_finds(run: CloudRun, cloud: Cloud) -> None:
    cloud.api.hold = True
    launched = run.launch(SHORT)
    run.wait_until(lambda: "WAITING_FOR_RESOURCES" in launched.text, "it waits")
    launched.process.kill()
    launched.process.wait()
    found = run.plain("gc")
    assert found.wait() == 0
    assert run.slice() in found.text
    assert run.place in found.text
    deleted = run.plain("gc", "--delete", "--yes", run.slice())
    assert deleted.wait() == 0, deleted.text
    assert cloud.nothing_is_left


def test_a_launcher_killed_before_the_deletion_leaves_it_to_the_next_one(run: CloudRun, cloud: Cloud) -> None:
    run.hold_at(2)
    launched = run.launch("train.steps=4", cluster=ONE_VM)
    run.wait_for_step(2)
    (k,) = run.machines()
    cloud.vms.run(k, "sh", "-c", "mkdir -p /run/podlaunch && touch -d @0 /run/podlaunch/alive")
    age = ("stat", "-c", "%Y", "/run/podlaunch/alive")
    wait_until(lambda: cloud.vms.run(k, *age).strip() != "0", "the agent shows a sign of life")
    cloud.api.fail_next(400, "an operation is in progress", method="queuedResources.delete", times=1000)
    run.let_go()
    run.wait_until(lambda: "trying again in" in launched.text, "the deletion is refused")
    launched.process.kill()
    launched.process.wait()
    assert run.result()["status"] == "completed"
    cloud.api.forgive()
    attached = run.command("attach")
    assert attached.wait() == 0, attached.text
    assert f"deleted     {run.slice()}" in attached.text
    assert cloud.nothing_is_left


def test_a_vm_without_sshd_is_named_and_its_slice_given_up_for_another(run: CloudRun, cloud: Cloud) -> None:
    cloud.vms.stop_sshd(1)
    try:
        launched = run.launch("--max-restarts", "1", SHORT)
        assert launched.wait() == 1, launched.text
    finally:
        cloud.vms.start_sshd(1)
    address = cloud.vms.machines[1].internal_address
    failures = [a["failure"] for a in run.attempts()]
    assert [(f["host"], f["cause"]) for f in failures] == 2 * [(address, "not started")]
    assert "not reached by ssh" in failures[0]["error"]
    assert cloud.nothing_is_left


def test_a_vm_without_disk_is_named_at_once(run: CloudRun, cloud: Cloud) -> None:
    cloud.vms.fill_disk(0, 1 << 20)
    try:
        launched = run.launch(SHORT)
        assert launched.wait() == 2, launched.text
    finally:
        cloud.vms.wipe(0)
    assert f"on {cloud.vms.machines[0].internal_address} failed" in launched.text
    assert "0.0 GiB free" in launched.text
    assert cloud.nothing_is_left
