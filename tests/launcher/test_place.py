"""Where a task of a SLURM step is, what its nodes are called, and the port at which the tasks meet."""

import shutil
import socket
import subprocess

import pytest

from configs.errors import UserError
from launcher.place import Place, _expanded, address, hold_port, hostnames, in_slurm_step

STEP = {
    "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "3", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NODELIST": "n[1-3]", "SLURMD_NODENAME": "n3", "SLURM_RESTART_COUNT": "2",
}  # fmt: skip


def test_place_in_a_step():
    place = in_slurm_step(STEP)
    assert place == Place(5, 6, 1, "n3", ("n1", "n2", "n3"), "12.3", 2)
    assert place.processes_per_node == 2


def test_a_batch_script_is_no_step():
    assert in_slurm_step({"SLURM_JOB_ID": "12", "SLURM_PROCID": "0"}) is None


def test_nodes_with_unequal_numbers_of_tasks_are_refused():
    with pytest.raises(UserError, match="5 tasks on 3 nodes"):
        in_slurm_step(STEP | {"SLURM_STEP_NUM_TASKS": "5"})


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
    assert _expanded(nodelist) == expected


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
    assert done.stdout.split() == _expanded(nodelist)


@pytest.fixture
def alone() -> Place:
    return Place(0, 1, 0, "n1", ("n1",), "12.0", 0)


def test_address_is_that_of_the_interface_asked_for(alone):
    assert address(alone, "lo") == "127.0.0.1"


def test_processes_of_one_node_meet_on_loopback(alone):
    assert address(alone, None) == "127.0.0.1"


def test_address_is_the_one_that_leads_to_the_other_nodes():
    assert address(Place(0, 2, 0, "n1", ("n1", "localhost"), "12.0", 0), None) == "127.0.0.1"


def test_interface_that_is_not_there_is_told_with_those_that_are(alone):
    with pytest.raises(UserError, match=r"n1 has no network interface ib9 .* one of: .*lo"):
        address(alone, "ib9")


def test_nodes_that_cannot_be_found_are_told():
    place = Place(0, 2, 0, "n1", ("n1", "nowhere.invalid"), "12.0", 0)
    with pytest.raises(UserError, match=r"n1 finds no way to nowhere\.invalid"):
        address(place, None)


def test_held_port_is_the_coordinators_and_nobody_elses():
    with hold_port("127.0.0.1") as held, hold_port("127.0.0.1") as other:
        name = held.getsockname()
        assert other.getsockname() != name
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(name)
        with socket.socket() as coordinator:  # as gRPC does
            coordinator.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            coordinator.bind(name)
            coordinator.listen()
            with socket.create_connection(name, timeout=5) as client:
                coordinator.accept()[0].close()
                assert client.recv(1) == b""
