"""The device of these tests: a GPU where there is one and the tests are asked for, or a CPU that stands in for it."""

import os

import jax
import pytest

from launcher.machine.devices import cuda_advice, has_cuda_plugin, num_nvidia_gpus

ON = os.environ.get("TEST_GPU_ON")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = ""
    if ON is None:
        reason = "needs an NVIDIA GPU: `make test-gpu` there, or TEST_GPU_ON=cpu to rehearse on the CPU"
    elif ON == "gpu" and not num_nvidia_gpus():
        reason = "this machine has no NVIDIA GPU; TEST_GPU_ON=cpu rehearses on the CPU"
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason))


@pytest.fixture(scope="session")
def device() -> jax.Device:
    assert ON == "cpu" or has_cuda_plugin(), f"jax is installed without CUDA: {cuda_advice()}"
    return jax.devices(ON)[0]


@pytest.fixture(scope="session")
def cpu() -> jax.Device:
    return jax.devices("cpu")[0]
