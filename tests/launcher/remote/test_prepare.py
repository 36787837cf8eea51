"""What a worker on a rented host is given."""

import dataclasses
import os

import pytest

from configs.clusters import TpuCluster
from launcher.providers import Machine
from launcher.remote.attempt import RemoteAttempt
from launcher.remote.prepare import Preparation, host_environment, slice_environment
from launcher.remote.shipping import SETUP
from launcher.remote.ssh import HostError, Ssh
from launcher.rundir import RunDirectory


def _machines(num_slices: int) -> list[Machine]:
    """Two VMs a slice."""
    return [
        Machine(s, w, f"192.0.2.{2 * s + w}", None, (), f"vm-{s}-{w}")
        for s in range(num_slices)
        for w in range(2)
    ]


def test_module_path_of_the_user_comes_behind_the_code_of_the_run():
    cluster = TpuCluster(accelerator="v4-8", environment={"PYTHONPATH": "/opt/mine", "A": "1"})
    assert host_environment(cluster, "/home/me/run") == {
        "PYTHONPATH": "/home/me/run/code:/opt/mine",
        "A": "1",
    }
    bare = TpuCluster(accelerator="v4-8")
    assert host_environment(bare, "/home/me/run") == {"PYTHONPATH": "/home/me/run/code"}


def test_workers_of_one_slice_are_told_of_no_other():
    assert slice_environment(_machines(1), 1) == {}


def test_workers_of_several_slices_find_the_first_vm():
    machines = _machines(2)
    assert [slice_environment(machines, p)["MEGASCALE_SLICE_ID"] for p in range(4)] == ["0", "0", "1", "1"]
    assert slice_environment(machines, 3) == {
        "MEGASCALE_COORDINATOR_ADDRESS": "192.0.2.0:8080",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
    }


@pytest.fixture
def preparing(planned, tmp_path, monkeypatch):
    """Prepares a host that is this machine, with a script in the place of environment.sh."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text('#!/bin/sh\nfor command; do :; done\nexec sh -c "$command"\n')
    ssh.chmod(0o700)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")

    def preparing(script, **settings):
        cluster = TpuCluster(accelerator="v4-8", reach="internal", **settings)
        plan = planned(cluster="tpu-v4-8", root="gs://bucket/runs")
        plan = dataclasses.replace(plan, submission=cluster.model_dump(mode="json"))
        file = tmp_path / "run" / "code" / SETUP
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(script)
        attempt, machines = RemoteAttempt(plan, RunDirectory(tmp_path / "directory"), 1), _machines(1)[:1]
        return Preparation(attempt, Ssh(cluster, machines, tmp_path), "name", machines)

    return preparing


def test_environment_is_made_with_the_interpreter_and_the_variables_of_the_cluster(preparing, tmp_path):
    script = 'echo noise; echo "$1|$2|$PIP_INDEX_URL"'
    mirror = {"PIP_INDEX_URL": "https://mirror/simple?a=b c"}
    answer = preparing(script, environment=mirror, interpreter="gs://mine/python")._python(
        0, f"{tmp_path}/run"
    )
    assert answer == f"{tmp_path}/environments|gs://mine/python|https://mirror/simple?a=b c"
    assert preparing(script)._python(0, f"{tmp_path}/run") == f"{tmp_path}/environments||"


def test_environment_that_fails_tells_its_last_ten_lines(preparing, tmp_path):
    with pytest.raises(HostError) as failed:
        preparing("seq 12 >&2; exit 1")._python(0, f"{tmp_path}/run")
    assert str(failed.value).split("\n            | ") == ["12", *map(str, range(3, 12))]
