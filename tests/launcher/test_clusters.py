"""A cluster name means one set of processes and devices, or an error with the nearest name."""

import pytest

from configs.errors import UserError
from launcher.clusters import ClusterSpec, default, resolve


@pytest.fixture(autouse=True)
def _no_accelerator(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.parametrize(
    ("name", "processes", "devices"),
    [("local", 1, 1), ("local-1", 1, 1), ("local-4", 4, 1), ("local-2x3", 2, 3), ("local-16x16", 16, 16)],
)
def test_local_clusters(name, processes, devices):
    assert resolve(name) == ClusterSpec(name, "local", "cpu", 1, processes, devices)


def test_default_without_accelerator_is_two_processes_of_two_devices():
    assert default() == resolve("local-2x2")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("locl", 'did you mean "local"?'),
        ("lcoal-4", 'did you mean "local-4"?'),
        ("local-2X2", 'did you mean "local-2x2"?'),
        ("local-", "did you mean"),
        ("local-2x", "did you mean"),
        ("local--2", "did you mean"),
        ("tpu-v4-32", "(there are: local, local-P, local-PxD, slurm-NxG, NAME"),
        ("local-" + "9" * 5000, "(there are: local, local-P, local-PxD, slurm-NxG, NAME"),
        ("", "(there are: local, local-P, local-PxD, slurm-NxG, NAME"),
    ],
)
def test_unknown_cluster_names_the_nearest_or_all(name, hint):
    with pytest.raises(UserError) as refused:
        resolve(name)
    assert str(refused.value).startswith(f"cluster = {name}: unknown")
    assert hint in str(refused.value)


@pytest.mark.parametrize("name", ["local-0", "local-2x0", "local-0x2", "local-257", "local-16x17"])
def test_no_processes_and_too_many_are_refused_with_what_is_allowed(name):
    with pytest.raises(UserError, match="allowed: 1 to 256"):
        resolve(name)
