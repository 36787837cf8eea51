"""What others can do who write to the bucket of a run: each line of docs/security.md about a run directory."""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from configs.errors import UserError
from launcher.backends import tpu
from launcher.commands.main import main
from launcher.commands.trust import note_launch, own_plan
from launcher.plan import Plan
from launcher.remote.shipping import CodeArchive
from launcher.rundir import RunDirectory, list_runs
from tests import tpu_api
from tests.gcs import BUCKET
from tests.gcs import Server as Storage
from tests.tpu_api import PROJECT, ZONE, Server, TestMachine

ROOT = f"gs://{BUCKET}/runs"
NAME = "quickstart"
PLAN = f"runs/{NAME}/plan.json"
HERE = TestMachine("127.0.0.1", "127.0.0.1", "ssh-ed25519 AAAA")


@pytest.fixture(autouse=True)
def laptop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home of its own, with nothing in it."""
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME", "CLOUDSDK_CONFIG"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch, gcs: Storage) -> Iterator[Server]:
    with tpu_api.in_use(monkeypatch, Server([HERE])) as server:
        yield server


@pytest.fixture
def launched(api: Server, planned: Callable[..., Plan]) -> Plan:
    """A run on a slice of one VM, which another machine has launched, and which nobody looks after now."""
    plan = tpu.resolve(planned(cluster="tpu-v4-8", root=ROOT))  # type: ignore[arg-type]
    run = RunDirectory(plan.run_directory)
    run.write_plan(plan)
    rental = tpu._rental(plan, run)
    rental.request(ZONE, tpu._request(plan, None, "on-demand", 1.0))
    while rental.conditions()[ZONE].status != "ready":
        pass
    rental.grant(ZONE)
    run.attempts.begin({})
    run.attempts.write_info(1, {"agents": [["podlaunch/x", "python3"]]})
    return plan


def change(gcs: Storage, submission: dict[str, Any] | None = None, **fields: Any) -> None:
    """Write to plan.json as everyone can who has access to the bucket."""
    plan = json.loads(gcs.contents()[PLAN]) | fields
    plan["submission"] |= submission or {}
    gcs.put(PLAN, json.dumps(plan).encode())


def launch(*arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--root", ROOT])


def write_cluster(laptop: Path, **settings: Any) -> None:
    file = laptop / "podlaunch" / "clusters.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump({"tpu-v4-8": {"accelerator": "v4-8", **settings}}))


def test_options_of_ssh_in_a_bucket_run_nothing_here_and_ones_own_do(launched, gcs, laptop):
    theirs, ours = laptop / "theirs", laptop / "ours"
    change(gcs, {"ssh_options": [f"ProxyCommand=touch {theirs}"]})
    write_cluster(laptop, ssh_options=[f"ProxyCommand=touch {ours}"])
    result = launch("ssh", NAME, "--yes", "true")
    assert result.exit_code == 255, result.output  # the command of the user's own connects to nothing
    assert ours.exists()
    assert not theirs.exists()
    ours.unlink()
    (laptop / "podlaunch" / "clusters.yaml").unlink()
    assert launch("ssh", NAME, "--set", f"ssh_options=[ProxyCommand=touch {ours}]", "true").exit_code == 255
    assert ours.exists()
    assert not theirs.exists()


def test_way_to_the_hosts_in_a_bucket_runs_no_command_but_gclouds(launched, gcs, laptop, monkeypatch):
    theirs, arguments = laptop / "theirs", laptop / "arguments"
    gcloud = laptop / "bin" / "gcloud"
    gcloud.parent.mkdir()
    gcloud.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >"{arguments}"\n')
    gcloud.chmod(0o700)
    monkeypatch.setenv("PATH", f"{gcloud.parent}:{os.environ['PATH']}")
    change(gcs, {"reach": "iap", "iap_group": f"$(touch {theirs})%r", "network": f"x; touch {theirs}"})
    assert launch("ssh", NAME, "--yes", "true").exit_code == 255
    assert {f"--network=x; touch {theirs}", f"--dest-group=$(touch {theirs})%r"} <= set(
        arguments.read_text().splitlines()
    )
    assert not theirs.exists()


def test_secrets_and_keys_in_a_bucket_name_nothing_of_this_machine(launched, gcs, laptop, capsys):
    change(gcs, {"secrets": ["HOME"], "ssh_key": "/etc/shadow"})
    run = RunDirectory(launched.run_directory)
    plan = own_plan(run, (), yes=True)
    assert plan.submission is not None
    assert (plan.submission["secrets"], plan.submission["ssh_key"]) == ([], None)
    assert "not used    secrets, ssh_key: " in capsys.readouterr().out
    write_cluster(laptop, secrets=["WANDB_API_KEY"])
    note = next((laptop / "podlaunch" / "runs").iterdir())
    note.unlink()
    plan = own_plan(run, (), yes=True)
    assert plan.submission is not None
    assert plan.submission["secrets"] == ["WANDB_API_KEY"]


def test_own_settings_are_not_written_to_the_bucket_but_their_names(launched, gcs):
    own = {"ssh_options": ["Port=2222"], "ssh_key": "~/.ssh/mine", "secrets": ["WANDB_API_KEY"]}
    plan = replace(launched, submission=launched.submission | own)
    RunDirectory(plan.run_directory).write_plan(plan)
    stored = json.loads(gcs.contents()[PLAN])
    assert stored["submission"].keys().isdisjoint(own)
    assert stored["own_settings"] == ["secrets", "ssh_key", "ssh_options"]
    assert b"WANDB_API_KEY" not in gcs.contents()[PLAN]


def test_settings_of_a_launch_are_remembered_where_it_was_typed(launched):
    own = {"ssh_options": ["Port=2222"], "ssh_key": "~/.ssh/mine", "secrets": ["WANDB_API_KEY"]}
    plan = replace(launched, submission=launched.submission | own)
    note_launch(plan)
    run = RunDirectory(plan.run_directory)
    run.write_plan(plan)
    assert own_plan(run, (), yes=False).submission == plan.submission


@pytest.mark.parametrize("command", [["attach", NAME], ["stop", NAME], ["ssh", NAME, "true"]])
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, f"tpu-v4-8, on-demand, in {ZONE} of project {PROJECT}"),
        ({"project": "another"}, "project another"),
        ({"accelerator": "v4-4096", "provisioning": "spot"}, "a tpu-v4-4096, spot"),
    ],
)
def test_machine_that_has_not_launched_it_so_asks_its_user(launched, gcs, api, command, changed, words):
    if changed:  # it was launched from here, but not like that
        note_launch(launched)
    change(gcs, changed)
    before = len(api.log)
    result = launch(*command)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert "add --yes" in result.stderr
    assert all(method == "GET" for method, _ in api.log[before:])
    assert "runs/quickstart/stop" not in gcs.contents()


def test_machine_asks_before_it_reaches_a_tpu_that_was_there_before(launched, gcs):
    note_launch(launched)
    change(gcs, {"tpu": "theirs"})
    result = launch("ssh", NAME, "true")
    assert result.exit_code == 2, result.output
    assert "the TPU theirs" in result.stderr


def test_plan_leads_to_no_hosts_of_another_run(launched, gcs):
    change(gcs, name="victim", run_directory=f"{ROOT}/victim")
    plan = RunDirectory(launched.run_directory).plan()
    assert plan is not None
    assert tpu._name(plan) == tpu._name(launched)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"backend": "slurm"}, "its backend is 'slurm'"),
        ({"backend": "local"}, "its backend is 'local'"),
        ({"submission": {"zone": "../../x"}}, "its cluster's zone"),
        ({"config": {}}, "not a plan of this podlaunch"),
    ],
)
@pytest.mark.parametrize("command", ["attach", "stop", "status", "logs"])
def test_plan_that_is_none_of_a_run_on_cloud_tpu_is_refused(launched, gcs, command, changed, words):
    change(gcs, **changed)
    result = launch(command, NAME)
    assert result.exit_code == 2, result.output
    assert words in result.stderr


@pytest.mark.parametrize("key", ["project", "zone"])
def test_plan_that_does_not_say_where_its_hosts_are_is_refused(launched, gcs, key):
    change(gcs, {key: None})
    refused = launch("status", NAME)
    assert (refused.exit_code, "has no project or no zone" in refused.stderr) == (2, True), refused.output


@pytest.mark.parametrize("text", ["", "x", "[]", '{"rented": 5}', '{"rented": [{"a": 1}]}'])
def test_records_of_rented_hosts_that_are_none_are_told_in_one_line(launched, gcs, text):
    gcs.put(f"runs/{NAME}/resources.json", text.encode())
    shown = launch("status", NAME)
    assert isinstance(shown.exception, SystemExit | None), repr(shown.exception)
    assert ("resources.json is not as podlaunch wrote it" in shown.output) == bool(text)


@pytest.mark.parametrize(("section", "key"), [("checkpoint", "directory"), ("log", "tensorboard")])
def test_folders_of_this_machine_are_not_written_for_a_plan(launched, gcs, laptop, section, key):
    config = launched.config | {section: launched.config[section] | {key: str(laptop / "x")}}
    change(gcs, config=config)
    result = launch("attach", NAME, "--yes")
    assert result.exit_code == 2
    assert "is a folder; allowed: gs://bucket/prefix" in result.stderr
    assert not (laptop / "x").exists()


def test_what_others_wrote_cannot_steer_a_terminal(launched, gcs):
    title = "\x1b]0;owned\x07\x1b[2J\x9b31m"
    gcs.put("runs/quickstart/hosts/0.json", json.dumps({"phase": title, "time": 0}).encode())
    gcs.put("runs/quickstart/logs/attempt-1/host-0.log", f"{title}\x1b[32mgreen\x1b[0m\n".encode())
    for command in (["status", NAME], ["logs", NAME]):
        shown = launch(*command)
        assert shown.exit_code == 0, shown.output
        assert "owned" in shown.output
        assert not set(shown.output) & {"\x1b", "\x07", "\x9b"}
    assert "green" in launch("logs", NAME).output


@pytest.mark.parametrize("name", ["../x", "/tmp/podlaunch-x", "a/../../x"])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.SYMTYPE])
def test_code_in_a_bucket_is_unpacked_nowhere_but_on_hosts_and_below_its_folder(laptop, name, kind):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for entry in (tarfile.TarInfo("a.py"), tarfile.TarInfo(name)):
            entry.type = kind if entry.name == name else tarfile.REGTYPE
            tar.addfile(entry)
    with pytest.raises(UserError, match="is not a file below the folder of the code"):
        CodeArchive(packed.getvalue()).delta({})
    with pytest.raises(UserError, match="cannot be unpacked"):
        CodeArchive(b"no archive").delta({})
    assert list(laptop.iterdir()) == []


def test_names_that_no_run_can_have_are_not_listed(launched, gcs):
    for name in ("..", "a b", "\x1b[2J", "-x"):
        gcs.put(f"runs/{name}/plan.json", gcs.contents()[PLAN])
    assert [run.name for run in list_runs(ROOT)] == [NAME]
