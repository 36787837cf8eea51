"""The task of a SLURM step that this process is, and the names of the step's nodes."""

import shutil
import subprocess

import pytest

from configs.errors import UserError
from launcher.machine.slurm import SlurmTask, _expand, current_task, hostnames

STEP = {
    "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "3", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NODELIST": "n[1-3]", "SLURMD_NODENAME": "n3", "SLURM_RESTART_COUNT": "2",
}  # fmt: skip


def test_place_in_a_step():
    place = current_task(STEP)
    assert place == SlurmTask(5, 6, 1, "n3", ("n1", "n2", "n3"), "12.3", 2)
    assert place.processes_per_node == 2


def test_a_batch_script_is_no_step():
    assert current_task({"SLURM_JOB_ID": "12", "SLURM_PROCID": "0"}) is None


def test_nodes_with_unequal_numbers_of_tasks_are_refused():
    with pytest.raises(UserError, match="5 tasks on 3 nodes"):
        current_task(STEP | {"SLURM_STEP_NUM_TASKS": "5"})


LISTS = {
    "n1": ["n1"],
    "n[1-3]": ["n1", "n2", "n3"],
    "n[01-03,10],m7": ["n01", "n02", "n03", "n10", "m7"],
    "node001,node002": ["node001", "node002"],
    "a[1-2],b[3-4]": ["a1", "a2", "b3", "b4"],
    "rack[1-2]n[3-4]": ["rack1n3", "rack1n4", "rack2n3", "rack2n4"],
    "n[098-101]": ["n098", "n099", "n100", "n101"],
}
# SLURM 22.05 writes and reads such names one by one.
SUFFIXED = {
    "gpu[01-02]-ib": ["gpu01-ib", "gpu02-ib"],
    "gpu[01-02]-ib,cpu1": ["gpu01-ib", "gpu02-ib", "cpu1"],
    "r[1-2]-n[1,3]-ib": ["r1-n1-ib", "r1-n3-ib", "r2-n1-ib", "r2-n3-ib"],
}


@pytest.mark.parametrize("nodelist", LISTS | SUFFIXED)
def test_node_lists_with_brackets_and_suffixes(nodelist):
    expected = (LISTS | SUFFIXED)[nodelist]
    assert hostnames(nodelist) == expected
    assert _expand(nodelist) == expected


@pytest.mark.parametrize("nodelist", LISTS)
def test_scontrol_expands_the_same(nodelist, tmp_path, monkeypatch):
    if not shutil.which("scontrol"):
        pytest.skip("SLURM is not installed")
    conf = tmp_path / "slurm.conf"
    conf.write_text("ClusterName=x\nSlurmctldHost=localhost\nNodeName=n1\nPartitionName=p Nodes=n1\n")
    monkeypatch.setenv("SLURM_CONF", str(conf))
    done = subprocess.run(
        ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == _expand(nodelist)
