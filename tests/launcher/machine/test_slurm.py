"""The task of a SLURM step that this process is, and the names of the step's nodes."""

import shutil
import subprocess

import pytest

from configs.errors import UserError
from launcher.machine.slurm import (
    SlurmTask,
    _expand,
    command_environment,
    current_task,
    hostnames,
    ignored_variables,
    job_id,
    node_address,
    step_environment,
)

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


def test_tasks_of_an_array_are_not_called_by_the_array_s_own_id():
    # In the last task SLURM_JOB_ID is also the id of the array, and so means all tasks to scancel and scontrol.
    array = STEP | {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1"}
    assert job_id(array) == "12_1"
    assert current_task(array).step == "12_1.3"
    assert job_id(STEP) == "12"


def test_heterogeneous_job_is_refused():
    with pytest.raises(UserError, match=r"this is a heterogeneous job of 2 components, .*; submit a job"):
        current_task(STEP | {"SLURM_HET_SIZE": "2"})


AROUND = {
    "HOME": "/home/me", "SLURM_CONF": "/etc/slurm.conf", "SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "2",
    "SLURM_LABELIO": "1", "SLURM_MEM_PER_CPU": "9", "SBATCH_PARTITION": "a", "SBATCH_MEM_BIND": "local",
    "SRUN_CPUS_PER_TASK": "2", "SQUEUE_STATES": "all", "SLURMD_DEBUG": "5", "SLURM_CLUSTERS": "b",
    "_SLURM_SPANK_OPTION_pyxis_container_image": "x", "SLURMISH": "mine",
}  # fmt: skip


def test_commands_and_new_jobs_get_none_of_slurm_s_options():
    assert command_environment(AROUND).keys() == {"HOME", "SLURM_CONF", "SLURMISH"}


def test_steps_get_of_slurm_s_variables_those_that_say_which_job_this_is():
    more = step_environment(AROUND).keys() - command_environment(AROUND).keys()
    assert more == {"SLURM_JOB_ID", "SLURM_RESTART_COUNT", "_SLURM_SPANK_OPTION_pyxis_container_image"}


def test_variables_that_were_meant_for_sbatch_are_told():
    assert ignored_variables(AROUND) == ["SBATCH_PARTITION", "SLURM_CLUSTERS"]


def test_address_of_a_node_is_what_slurm_says_or_else_its_name(tmp_path, monkeypatch):
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "NodeName=$4 CPUTot=2 NodeAddr=10.0.0.7 NodeHostName=host7"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert node_address("gpu-a.rack1") == "10.0.0.7"
    scontrol.unlink()
    assert node_address("gpu-a.rack1") == "gpu-a.rack1"
