"""Which GPUs a process gets on its node; hosts with workers run in tests/clusters."""

import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from configs.errors import UserError
from launcher.host.external import start_worker_on
from launcher.host.process import shell_exit_code
from launcher.host.task import SlurmTaskHost, _network_environment, device_environment
from launcher.machine.slurm import SlurmTask
from launcher.rundir import RunDirectory


def place(local: int, per_node: int) -> SlurmTask:
    return SlurmTask(local, per_node, local, "n1", ("n1",), "12.0", 0)


@pytest.fixture
def gpu_plan(planned):
    return lambda devices_per_process: replace(
        planned(), platform="gpu", devices_per_process=devices_per_process
    )


@pytest.mark.parametrize(
    ("local", "per_node", "wanted", "visible", "ids"),
    [
        (0, 1, 8, 8, "0,1,2,3,4,5,6,7"),  # one process a node
        (3, 8, 1, 8, "3"),  # one a GPU, all of them visible
        (3, 8, 1, 1, "0"),  # one a GPU, bound by SLURM
        (1, 2, 4, 8, "4,5,6,7"),
    ],
)
def test_devices_are_named_whatever_slurm_shows(gpu_plan, local, per_node, wanted, visible, ids):
    found = device_environment(gpu_plan(wanted), place(local, per_node), visible)
    assert found == {"JAX_LOCAL_DEVICE_IDS": ids}


@pytest.mark.parametrize("visible", [0, 1, 7, 16])
def test_other_numbers_of_gpus_than_planned_are_refused(gpu_plan, visible):
    with pytest.raises(
        UserError, match=f"n1 shows {visible} GPUs to process 0; the plan .* has 8 for each of the 1"
    ):
        device_environment(gpu_plan(8), place(0, 1), visible)


def test_cpu_devices_are_left_to_their_number(planned):
    assert device_environment(planned(), place(0, 1), 8) == {}


def test_exit_code_of_a_host_is_that_of_its_worker_or_the_shells_for_its_signal():
    assert [shell_exit_code(code) for code in (0, 75, 2, -9)] == [0, 75, 2, 137]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {}),
        ({"LAUNCH_INTERFACE": "ib0"}, {"NCCL_SOCKET_IFNAME": "ib0"}),
        ({"LAUNCH_INTERFACE": "ib0", "NCCL_SOCKET_IFNAME": "ib1"}, {"NCCL_SOCKET_IFNAME": "ib1"}),
    ],
)
def test_nccl_uses_the_clusters_interface_unless_it_is_told_another(monkeypatch, environment, expected):
    for name in ("LAUNCH_INTERFACE", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert _network_environment() == expected


def test_host_that_waits_for_process_0_heeds_a_request_to_stop(tmp_path, planned):
    run = RunDirectory(tmp_path / "runs" / "quickstart")
    run.write_plan(planned())
    number = run.attempts.begin({})
    host = SlurmTaskHost(SlurmTask(1, 2, 0, "n2", ("n1", "n2"), "12.0", 0), run)
    with ThreadPoolExecutor() as pool:
        started = pool.submit(start_worker_on, host, run, number)
        while not list((run.path / "logs").glob("rendezvous-*")):  # process 0 never comes
            assert not started.done()
        host.request_stop()
        assert started.result(timeout=60)
    assert host.wait() == -signal.SIGTERM
