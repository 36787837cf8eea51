"""What a worker on a rented host is given."""

from configs.clusters import TpuCluster
from launcher.providers import Machine
from launcher.remote.prepare import host_environment, slice_environment


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
