"""What `launch` on Cloud TPU refuses before it creates anything, what it creates, and what `launch gc` reports."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import configs
from configs.load import load
from launcher import clusters
from launcher.backends import tpu
from launcher.commands.main import main
from launcher.plan import Plan, make_plan
from launcher.providers import OWNER
from launcher.rundir import RunDirectory, run_id
from launcher.supervise import write_result
from tests import tpu_api
from tests.gcs import BUCKET, Fault
from tests.gcs import Server as Storage
from tests.tpu_api import PROJECT, ZONE, Server
from tests.trainer.datasets import blobs, write

QUICKSTART = str(Path(configs.__file__).with_name("quickstart.yaml"))
ROOT = f"gs://{BUCKET}/runs"
Launch = Callable[..., Result]


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, gcs: Storage) -> Iterator[Server]:
    with tpu_api.in_use(monkeypatch, Server()) as server:
        yield server


@pytest.fixture(autouse=True)
def _laptop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A home of its own, with nothing in it."""
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "CLOUDSDK_CONFIG"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launcher.rundir.lease.RENEW_SECONDS", 0.05)


def launch(*arguments: str, cluster: str = "tpu-v4-32") -> Result:
    return CliRunner().invoke(main, [QUICKSTART, "--root", ROOT, "--cluster", cluster, *arguments])


def assert_refused(result: Result, *fragments: str) -> None:
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2
    assert all(line.startswith("error: ") for line in result.stderr.splitlines()), result.stderr
    assert [f for f in fragments if f not in result.stderr] == [], result.stderr


def nothing_was_created(api: Server, gcs: Storage) -> bool:
    return not api.nodes and not api.queued_resources and not gcs.contents() and not api.rejected


# What is refused, each with nothing created


def test_a_local_run_directory(api, gcs, tmp_path):
    result = CliRunner().invoke(main, [QUICKSTART, "--cluster", "tpu-v4-32", "--yes"])
    assert_refused(result, "not given: root", "launch configure root=gs://")
    result = CliRunner().invoke(main, [QUICKSTART, "--cluster", "tpu-v4-32", "--yes", "--root", "runs"])
    assert_refused(result, "--root runs", "gs://bucket/prefix", "launch configure root=gs://")
    assert api.log == []
    assert not (tmp_path / "runs").exists()


def test_a_mesh_that_does_not_fit_the_slice(api, gcs):
    assert_refused(launch("--yes", "mesh.model=3"), "mesh.model = 3", '"tpu-v4-32" has 16')
    assert api.log == []


def test_a_checkpoint_folder_of_this_machine(api, gcs):
    assert_refused(launch("--yes", "checkpoint.directory=/data/x"), "checkpoint.directory = /data/x", "gs://")
    assert api.log == []


def test_no_project(api, gcs, monkeypatch):
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT")
    assert_refused(launch("--yes"), "not given: project", "`launch configure project=")
    assert api.log == []


def test_no_zone(api, gcs, monkeypatch):
    monkeypatch.delenv("CLOUDSDK_COMPUTE_ZONE")
    assert_refused(launch("--yes"), "not given: zone", "`launch configure zone=")
    assert api.log == []


def test_no_credentials(api, gcs, monkeypatch):
    monkeypatch.delenv("CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU")
    assert_refused(launch("--yes"), "no Google credentials", "gcloud auth application-default login")
    assert nothing_was_created(api, gcs)


def test_an_api_that_is_not_enabled(api, gcs):
    api.service_disabled()
    assert_refused(launch("--yes"), f"gcloud services enable tpu.googleapis.com --project {PROJECT}")
    assert nothing_was_created(api, gcs)


def test_credentials_without_permission(api, gcs):
    api.fail_next(403, "Permission 'tpu.queuedResources.create' denied", method="queuedResources.create")
    assert_refused(launch("--yes"), "roles/tpu.admin")
    assert nothing_was_created(api, gcs)


def test_a_quota_that_is_used_up(api, gcs):
    words = "Quota limit 'TPUV4sPodPerProjectPerZone' has been exceeded. Limit: 8 in region us-central2."
    api.fail_next(429, words, method="queuedResources.create", times=50)
    assert_refused(launch("--yes"), "Quota limit 'TPUV4sPodPerProjectPerZone' has been exceeded")
    assert nothing_was_created(api, gcs)


def test_a_zone_without_that_type_names_those_that_have_it(api, gcs):
    result = launch("--yes", "--set", "zone=europe-west4-a")
    assert_refused(result, "europe-west4-a", ZONE)
    assert nothing_was_created(api, gcs)


@pytest.mark.parametrize("root", ["gs://", "gs:///x", "gs://-bad/x", "s3://bucket/x"])
def test_a_root_that_is_no_place(api, root):
    assert_refused(
        CliRunner().invoke(main, [QUICKSTART, "--root", root, "--cluster", "tpu-v4-32"]), f"--root {root}"
    )
    assert api.log == []


@pytest.mark.parametrize("setting", ["tpu=a/b", "zone=../..", "project=a/b"])
def test_a_name_that_is_none_of_google(api, gcs, setting):
    assert_refused(launch("--yes", "--set", setting), setting.replace("=", " = "))
    assert api.log == []


def test_another_zone_while_the_slice_of_the_run_is_there(api, gcs):
    plan = tpu.resolve(_planned())
    run = RunDirectory(plan.run_directory)
    tpu.acquire(plan, run)
    run.write_plan(plan)
    run.attempts.begin({})
    result = launch("--yes", "--set", "zone=us-east5-a")
    assert_refused(result, "is queued", f"zone: {ZONE}, now us-east5-a", "launch attach quickstart")
    assert len(api.queued_resources) == 1


def test_one_place_has_one_name(api):
    result = CliRunner().invoke(
        main, ["plan", QUICKSTART, "--root", "gs://bucket//a/", "--cluster", "tpu-v4-32", "--json"]
    )
    assert json.loads(result.stdout)["run_directory"] == "gs://bucket/a/quickstart"


def test_a_bucket_that_is_absent(api, gcs):
    result = CliRunner().invoke(
        main, [QUICKSTART, "--root", "gs://absent/runs", "--cluster", "tpu-v4-32", "--yes"]
    )
    assert_refused(result, "there is no bucket absent")
    assert nothing_was_created(api, gcs)


def test_a_bucket_that_may_not_be_written(api, gcs):
    gcs.faults = [Fault("status", operation="upload", status=403)]
    assert_refused(launch("--yes"), "no permission (HTTP 403)")
    assert nothing_was_created(api, gcs)


def test_a_secret_that_is_not_exported(api, gcs):
    assert_refused(launch("--yes", "--set", "secrets=[WANDB_API_KEY]"), "WANDB_API_KEY", "export")
    assert api.log == []


RECORDS = [
    "data.source=records", "data.train.path=gs://bucket/train", "data.eval.path=gs://bucket/eval",
    "data.train.num_examples=640", "data.eval.num_examples=64",
]  # fmt: skip


@pytest.fixture
def images(gcs: Storage, tmp_path: Path) -> None:
    for split, count in (("train", 640), ("eval", 64)):
        write(tmp_path / split, blobs(count, 100), [i % 10 for i in range(count)])
        gcs.put_folder(tmp_path / split, f"{split}/")


def plan_of(*arguments: str) -> Result:
    return CliRunner().invoke(
        main, ["plan", QUICKSTART, "--root", ROOT, "--cluster", "tpu-v4-32", *arguments]
    )


def nothing_was_asked_for(api: Server) -> bool:
    return not any(method == "POST" for method, _ in api.log)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.train.path=gs://bucket/none", "data.train.path: gs://bucket/none"),
        ("data.eval.path=gs://absent/x", "there is no bucket absent"),
        ("data.train.num_examples=641", "data.train.num_examples = 641, but gs://bucket/train holds 640"),
        ("model.num_classes=5", "outside of model.num_classes = 5"),
    ],
)
def test_a_dataset_that_is_none_or_another(api, gcs, images, change, words):
    assert_refused(launch("--yes", *RECORDS, change), words)
    assert nothing_was_asked_for(api)
    assert gcs.contents(f"{ROOT.removeprefix('gs://bucket/')}/") == {}
    assert_refused(plan_of(*RECORDS, change), words)


def test_the_imagenet_recipe_as_it_stands_without_its_images(api, gcs, monkeypatch):
    CliRunner().invoke(main, ["configure", f"root={ROOT}", f"data=gs://{BUCKET}"])
    recipe = str(Path(QUICKSTART).with_name("r152.yaml"))
    result = CliRunner().invoke(main, ["--cluster", "tpu-v4-32", recipe, "--yes"])
    assert_refused(result, "data.train.path: gs://bucket/imagenet/train")
    assert nothing_was_asked_for(api)
    assert nothing_was_created(api, gcs)


def test_a_dataset_that_only_the_hosts_may_read_is_no_mistake(api, gcs, images):
    assert plan_of(*RECORDS).stderr == ""
    gcs.faults = [
        Fault("status", object=f"{split}/*", operation="*", status=403) for split in ("train", "eval")
    ]
    result = plan_of(*RECORDS)
    assert result.exit_code == 0, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith(
        "not checked data.train.path: gs://bucket/train: these credentials have no permission"
    )
    assert "error: the TPU costs money" in launch(*RECORDS).stderr  # it goes on to where it would create


def test_a_tpu_that_is_not_there(api, gcs):
    assert_refused(launch("--yes", "--tpu", "mine"), "--tpu mine", "absent")
    assert nothing_was_created(api, gcs)


def test_nobody_to_ask_whether_to_create(api, gcs):
    result = launch()
    assert_refused(result, "costs money", "--yes")
    assert "v4-32 (2x2x4), 4 VMs, on-demand" in result.stdout
    assert "16 chips, 16 chip-hours ($51.52) an hour" in result.stdout
    assert nothing_was_created(api, gcs)


def test_code_that_is_too_large_to_ship(api, gcs):
    assert_refused(launch("--yes", "--set", "max_code_mib=0.01"), "max_code_mib = 0.01", "largest files")
    assert nothing_was_created(api, gcs)


def test_a_setting_that_is_misspelt(api, gcs):
    assert_refused(launch("--yes", "--set", "provisionning=spot"), "provisionning", "provisioning")
    assert api.log == []


def test_a_name_that_somebody_else_has_taken(api, gcs):
    name = re.search(r"as (podlaunch-\S+)", launch().stdout)[1]
    other = {"tpu": {"nodeSpec": [{"parent": f"projects/{PROJECT}/locations/{ZONE}", "nodeId": name, "node": {
        "acceleratorType": "v4-8", "runtimeVersion": "x", "labels": {OWNER: "another"}}}]}}  # fmt: skip
    path = f"/v2/projects/{PROJECT}/locations/{ZONE}/queuedResources"
    status, _ = api.answer("POST", path, {"queuedResourceId": name}, json.dumps(other).encode())
    assert status == 200
    assert_refused(launch("--yes"), name)
    assert len(api.queued_resources) == 1


# What still costs money after a run has ended


class Ended:
    """A completed run whose launcher was killed between the result and the deletion of the slice."""

    def __init__(self, api: Server):
        self.api, self.plan = api, tpu.resolve(_planned())
        api.hold = True
        self.run = RunDirectory(self.plan.run_directory)
        with self.run.planned(self.plan):
            tpu.acquire(self.plan, self.run)
        self.run.begin_launch(None)
        self.run.write_result(write_result(self.plan, self.run, "completed") | {"step": self.plan.steps})
        self.name = tpu._name(self.plan)

    def command(self, name: str, *arguments: str) -> Result:
        return CliRunner().invoke(main, [name, "--root", ROOT, *arguments])

    def is_deleted(self) -> bool:
        self.run.refresh()
        return not self.api.queued_resources and not self.run.resources.unreleased()


@pytest.fixture
def ended(api: Server, monkeypatch: pytest.MonkeyPatch) -> Ended:
    monkeypatch.setattr("launcher.remote.rental.MIN_RETRY_SECONDS", 0.02)
    monkeypatch.setattr("launcher.remote.rental.MAX_RETRY_SECONDS", 0.02)
    return Ended(api)


@pytest.mark.parametrize("command", ["status", "list"])
def test_a_slice_that_outlived_its_run_is_shown(ended, command):
    shown = ended.command(command)
    assert shown.exit_code == 0, shown.output
    assert "completed" in shown.stdout
    assert (
        f"{ended.name} in {ZONE} of project {PROJECT} still costs money, until `launch attach" in shown.stdout
    )
    ended.api.queued_resources.clear()  # deleted by other means
    assert "costs money" not in ended.command(command).stdout


@pytest.mark.parametrize("command", ["attach", "stop"])
def test_whoever_looks_after_the_run_next_deletes_its_slice(ended, command):
    done = ended.command(command)
    assert done.exit_code == 0, done.output
    assert f"left behind {ended.name}" in done.stdout
    assert f"deleted     {ended.name}" in done.stdout
    assert ended.is_deleted()
    assert "costs money" not in ended.command("status").stdout
    assert "left behind" not in ended.command(command).stdout


def test_the_same_launch_again_deletes_the_slice_of_the_completed_run(ended):
    done = launch("--yes")
    assert done.exit_code == 0, done.output
    assert "is complete" in done.stdout
    assert ended.is_deleted()


def test_a_refused_deletion_is_repeated(ended):
    ended.api.fail_next(400, "an operation is in progress", method="queuedResources.delete", times=3)
    done = ended.command("attach")
    assert done.exit_code == 0, done.output
    assert "an operation is in progress" in done.stdout
    assert "trying again in" in done.stdout
    assert ended.is_deleted()


def test_a_deletion_outlives_longer_trouble_than_a_call_does(ended, monkeypatch):
    monkeypatch.setattr("launcher.providers.cloud_tpu.RETRY_SECONDS", 0.05)
    ended.api.fail_next(429, "try later", "RATE_LIMIT_EXCEEDED", method="queuedResources.delete", times=4)
    done = ended.command("attach")
    assert done.exit_code == 0, done.output
    assert "try later" in done.stdout
    assert ended.is_deleted()


def test_what_cannot_be_deleted_is_said_last_and_by_the_exit_code(ended, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("launcher.remote.rental.DELETION_SECONDS", 0.0)
        ended.api.fail_next(403, "Permission denied", method="queuedResources.delete", times=9)
        for command in ("attach", "stop"):
            done = ended.command(command)
            assert done.exit_code == 1
            last = done.stdout.splitlines()[-1]
            assert last.startswith(
                f"not deleted {ended.name} in {ZONE} of project {PROJECT}: IT STILL COSTS MONEY"
            )
        assert launch("--yes").exit_code == 1
        assert CliRunner().invoke(main, ["gc", "--delete", "--yes"]).exit_code == 1
    ended.api.forgive()
    assert ended.command("attach").exit_code == 0
    assert ended.is_deleted()


def test_what_is_not_the_runs_is_not_deleted_whatever_the_bucket_says(ended):
    for queued in ended.api.queued_resources.values():
        queued["tpu"]["nodeSpec"][0]["node"]["labels"][OWNER] = "another"
    for command in ("attach", "stop"):
        assert ended.command(command).exit_code == 0
    assert len(ended.api.queued_resources) == 1


def test_gc_records_what_it_deletes(ended):
    assert CliRunner().invoke(main, ["gc", "--delete", "--yes"]).exit_code == 0
    assert ended.is_deleted()


def test_a_slice_without_a_record_is_deleted_at_the_end_of_its_run(ended):
    ended.run.resources.forget()  # as an earlier podlaunch left it
    released = tpu.release(ended.plan, ended.run, print, threading.Event())
    assert (released.costs_money, released.sentence) == (False, f"deleted     {ended.name}")
    assert ended.is_deleted()


@pytest.mark.parametrize("settings", [{"tpu": "mine"}, {"tpu": "mine", "keep": True}])
def test_what_an_earlier_launch_left_is_deleted_by_one_that_uses_an_existing_tpu(ended, settings):
    plan = replace(ended.plan, submission={**ended.plan.submission, **settings})
    released = tpu.release(plan, ended.run, print, threading.Event())
    assert (released.costs_money, released.sentence) == (False, "left as it was: mine")
    assert ended.is_deleted()


def test_a_launch_on_an_existing_tpu_begins_by_deleting_what_an_earlier_one_left(ended):
    tpu.acquire(replace(ended.plan, submission={**ended.plan.submission, "tpu": "mine"}), ended.run)
    assert ended.is_deleted()


def test_a_request_that_was_not_granted_is_not_kept(ended):
    plan = replace(ended.plan, submission={**ended.plan.submission, "keep": True})
    released = tpu.release(plan, ended.run, print, threading.Event())
    assert released.sentence == f"deleted     {ended.name}"
    assert ended.is_deleted()


def test_a_kept_slice_is_no_error_and_is_shown_until_it_is_deleted(ended):
    tpu._rental(ended.plan, ended.run).grant(ZONE)
    plan = replace(ended.plan, submission={**ended.plan.submission, "keep": True})
    released = tpu.release(plan, ended.run, print, threading.Event())
    assert (released.costs_money, released.sentence.split()[0]) == (False, "kept")
    attached = ended.command("attach")
    assert (attached.exit_code, len(ended.api.queued_resources)) == (0, 1)
    assert "still costs money, until `launch gc --delete" in ended.command("status").stdout
    tpu.acquire(plan, ended.run)
    (taken,) = ended.run.resources.left_behind()
    assert taken.granted  # so that it is kept once more, whenever this launch ends
    tpu.release(plan, ended.run, print, threading.Event())
    assert len(ended.api.queued_resources) == 1
    assert CliRunner().invoke(main, ["gc", "--delete", "--yes", ended.name]).exit_code == 0
    assert "costs money" not in ended.command("status").stdout


@pytest.mark.parametrize(
    "words", [["attach", "--yes"], ["run", QUICKSTART, "--cluster", "tpu-v4-32", "--yes"]]
)
def test_a_run_that_completed_on_a_slice_that_is_gone_needs_no_other(api, gcs, words):
    plan = tpu.resolve(_planned())
    run = RunDirectory(plan.run_directory)
    with run.planned(plan):
        tpu.acquire(plan, run)
    run.begin_launch(None)
    run.attempts.begin({"agents": [["folder", "python"]]})
    run.hosts.write_report(0, {"time": 1.0, "outcome": {"status": "completed", "step": plan.steps}})
    rental = tpu._rental(plan, run)
    while rental.condition().status != "ready":
        pass
    rental.grant(ZONE)
    rental.provider().delete(rental.name)  # as the slice does by itself
    requests = [entry for entry in api.log if entry[0] == "POST"]
    assert "all steps are done" in CliRunner().invoke(main, ["status", "--root", ROOT]).stdout
    done = CliRunner().invoke(main, [words[0], "--root", ROOT, *words[1:]])
    assert done.exit_code == 0, done.output
    run.refresh()
    assert (run.result()["status"], run.result()["step"]) == ("completed", plan.steps)
    assert run.attempts.all()[0]["verdict"] == "completed"
    assert [entry for entry in api.log if entry[0] == "POST"] == requests
    assert nothing_is_rented(api, run)


def test_ctrl_c_ends_the_tries_to_delete_and_the_last_line_says_what_is_left(ended, tmp_path):
    ended.api.fail_next(400, "an operation is in progress", method="queuedResources.delete", times=1000)
    with (tmp_path / "out").open("w") as out:
        command = [sys.executable, "-m", "podlaunch", "attach", "--root", ROOT]
        attached = subprocess.Popen(command, stdout=out, stderr=out)
    while "trying again in" not in (tmp_path / "out").read_text():
        assert attached.poll() is None, (tmp_path / "out").read_text()
        time.sleep(0.05)
    attached.send_signal(signal.SIGINT)
    assert attached.wait(60) == 1
    assert "IT STILL COSTS MONEY" in (tmp_path / "out").read_text().splitlines()[-1]


def test_a_slice_that_an_earlier_launch_left_in_another_zone_is_deleted(api, gcs):
    place = {"accelerator": "v6e-16", "zone": "us-east5-a"}
    plan = tpu.resolve(_planned())
    first = replace(plan, submission={**plan.submission, **place})
    run = RunDirectory(plan.run_directory)
    for each, zone in ((first, "us-east5-a"), (plan, ZONE)):
        with run.planned(each):
            tpu.acquire(each, run)
        assert [r.zone for r in run.resources.unreleased()] == [zone]
        assert [name.split("/")[3] for name in api.queued_resources] == [zone]


def test_a_slice_that_an_earlier_launch_has_kept_in_another_zone_is_left_alone(api, gcs):
    plan = tpu.resolve(_planned())
    place = {"accelerator": "v6e-16", "zone": "us-east5-a", "keep": True}
    first = replace(plan, submission={**plan.submission, **place})
    run = RunDirectory(plan.run_directory)
    tpu.acquire(first, run)
    tpu._rental(first, run).grant("us-east5-a")
    tpu.release(first, run, print, threading.Event())
    tpu.acquire(plan, run)
    assert tpu._rental(plan, run).granted_zone() is None
    assert not tpu.release(plan, run, print, threading.Event()).costs_money
    assert [(r.zone, r.kept) for r in run.resources.unreleased()] == [("us-east5-a", True)]
    assert len(api.queued_resources) == 1


def test_a_launcher_that_is_killed_at_its_request_leaves_what_the_next_one_needs(api, gcs):
    api.hold = True
    arguments = [QUICKSTART, "--root", ROOT, "--cluster", "tpu-v4-32", "--yes"]
    with subprocess.Popen(
        [sys.executable, "-m", "podlaunch", *arguments], stdout=subprocess.DEVNULL
    ) as launched:
        api.after["queuedResources.create"] = launched.kill
        launched.wait(60)
    assert len(api.queued_resources) == 1
    api.after.clear()
    listed = CliRunner().invoke(main, ["list", "--root", ROOT])
    assert listed.stdout.split()[:2] == ["quickstart", "running"]  # its lease has not expired yet
    for name in list(gcs.contents()):
        if name.endswith("lease.json"):
            del gcs.objects[BUCKET, name]
    run = RunDirectory(f"{ROOT}/quickstart")
    assert "no launcher looks after it" in str(tpu.state(run))
    assert run.code()
    run.request_stop()
    assert CliRunner().invoke(main, ["attach", "--root", ROOT]).exit_code == 130
    assert nothing_is_rented(api, run)


def test_a_refused_request_leaves_the_earlier_launch_as_it_was(ended):
    CliRunner().invoke(main, ["attach", "--root", ROOT])
    before = ended.run.plan()
    ended.api.fail_next(403, "Permission denied", method="queuedResources.create")
    refused = launch("--yes", "train.epochs=9")
    assert_refused(refused, "Permission denied")
    assert RunDirectory(ended.run.location).plan() == before
    assert RunDirectory(ended.run.location).result()["status"] == "completed"
    assert nothing_is_rented(ended.api, ended.run)


def test_several_zones_are_requested_at_once_or_not_at_all(api, gcs):
    zones = "zone=[us-central1-a,us-east5-a]"
    quoted = launch("--set", zones, cluster="tpu-v6e-16")
    assert "in us-central1-a or us-east5-a, whichever grants it first, of project test" in quoted.stdout
    plan = tpu.resolve(_planned("tpu-v6e-16", zones))
    run = RunDirectory(plan.run_directory)
    api.hold = True
    tpu.acquire(plan, run)
    assert [r.zone for r in run.resources.unreleased()] == ["us-central1-a", "us-east5-a"]
    assert len(api.queued_resources) == 2
    tpu.release(plan, run, print, threading.Event())
    assert nothing_is_rented(api, run)
    refused = launch("--yes", "--set", f"zone=[us-central1-a,{ZONE}]", cluster="tpu-v6e-16")
    assert_refused(refused, f"zone {ZONE} has no v6e-16")
    assert nothing_is_rented(api, run)


def nothing_is_rented(api: Server, run: RunDirectory) -> bool:
    run.refresh()
    return not api.nodes and not api.queued_resources and not run.resources.unreleased()


# What is asked for, and shown without being asked for


def test_dry_run_asks_nobody(api, gcs):
    result = launch("--dry-run", "--set", "provisioning=spot", cluster="tpu-v5e-16x2")
    assert result.exit_code == 0, result.output
    assert "accelerator_type: v5litepod-16" in result.stdout
    assert "slices: 2" in result.stdout
    assert "provisioning: spot" in result.stdout
    assert "startup_script: deploy/tpu/startup.sh" in result.stdout
    assert api.log == []


@pytest.mark.parametrize("words", [["plan"], ["run", "--dry-run"]])
def test_a_plan_shows_what_it_costs(api, gcs, words):
    def price(*settings: str) -> str:
        more = [word for setting in settings for word in ("--set", setting)]
        shown = CliRunner().invoke(
            main, [*words, QUICKSTART, "--root", ROOT, "--cluster", "tpu-v4-32", *more]
        )
        assert shown.exit_code == 0, shown.output
        return shown.stdout[shown.stdout.index("price       ") :]

    assert "16 chips, 16 chip-hours ($51.52) an hour; at least" in price()
    spot = price("provisioning=spot", "on_demand_after_hours=6")
    assert "on demand, if spot is not granted within 6 h: 16 chips, 16 chip-hours ($51.52) an hour" in spot
    assert api.log == []


def test_plan_needs_no_project(monkeypatch):
    result = CliRunner().invoke(
        main, ["plan", QUICKSTART, "--root", ROOT, "--cluster", "tpu-v4-32", "--json"]
    )
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert (plan["hosts"], plan["devices_per_process"], plan["platform"]) == (4, 4, "tpu")
    assert plan["config"]["checkpoint"]["directory"] == f"{ROOT}/quickstart/checkpoints"
    assert plan["config"]["log"]["tensorboard"] == f"{ROOT}/quickstart/tensorboard"


def test_gc_finds_nothing_where_nothing_is(api):
    result = CliRunner().invoke(main, ["gc"])
    assert (result.exit_code, result.stdout) == (0, "no TPUs that podlaunch created exist\n")


def test_gc_knows_names(api):
    assert_refused(CliRunner().invoke(main, ["gc", "--delete", "mine"]), "mine", "launch gc")


def test_gc_tells_age_cost_and_run_and_deletes_what_it_is_told_to(api, gcs):
    place = f"{ROOT}/quickstart"
    plan = tpu.resolve(_planned())
    rental = tpu._rental(plan, RunDirectory(place))
    rental.provider().create(tpu._request(plan, "me:ssh-ed25519 AAAA", "on-demand", 24.0))
    while rental.condition().status != "ready":
        pass
    listed = CliRunner().invoke(main, ["gc"])
    assert listed.exit_code == 0, listed.output
    assert tpu._name(plan).endswith(run_id(place)[:6])
    for words in (tpu._name(plan), ZONE, "v4-32", "ready, 0.0 h", "chip-hours, $", place):
        assert words in listed.stdout
    assert_refused(CliRunner().invoke(main, ["gc", "--delete"]), "--yes")
    assert CliRunner().invoke(main, ["gc", "--delete", "--yes"]).exit_code == 0
    assert nothing_was_created(api, gcs)


def _planned(cluster: str = "tpu-v4-32", *settings: str) -> Plan:
    path = Path(QUICKSTART)
    return make_plan(
        load(path),
        clusters.resolve(cluster, (), settings),
        name="quickstart",
        root=ROOT,
        config_file=path,
        provenance={},
    )


def test_labels_say_whose_it_is_and_what_it_costs(api):
    labels = tpu._request(tpu.resolve(_planned()), None, "spot", 1.0).labels
    assert labels[OWNER] == tpu.run_id(f"{ROOT}/quickstart")
    assert (labels["podlaunch-chips"], labels["podlaunch-generation"]) == ("16", "v4")
    assert labels["podlaunch-owner"]
    assert labels["podlaunch-provisioning"] == "spot"
