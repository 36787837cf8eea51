"""A worker's place in the gang comes from four environment variables, which must be set together."""

import signal
from types import SimpleNamespace

import jax
import pytest

from configs.errors import UserError
from launcher.host import worker
from launcher.host.worker import Membership, StopSignal, membership

NAMES = ("LAUNCH_COORDINATOR", "LAUNCH_PROCESSES", "LAUNCH_PROCESS")


def place(monkeypatch, *values):
    for name, value in zip(NAMES, values, strict=True):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    return membership()


def test_without_a_launcher_a_worker_is_alone(monkeypatch):
    assert place(monkeypatch, None, None, None) == Membership(None, 1, 0)


def test_place_is_what_the_launcher_says(monkeypatch):
    assert place(monkeypatch, "10.0.0.1:8476", "4", "3") == Membership("10.0.0.1:8476", 4, 3)


@pytest.mark.parametrize(
    ("values", "missing"),
    [
        ((None, "4", "3"), "LAUNCH_COORDINATOR not set"),
        (("h:1", None, "3"), "LAUNCH_PROCESSES not set"),
        (("h:1", "4", ""), "LAUNCH_PROCESS not set"),
        ((None, "4", None), "LAUNCH_COORDINATOR, LAUNCH_PROCESS not set"),
    ],
)
def test_incomplete_environment_is_refused_instead_of_training_alone(monkeypatch, values, missing):
    with pytest.raises(UserError, match=missing):
        place(monkeypatch, *values)


@pytest.mark.parametrize(
    "values", [("h:1", "four", "3"), ("h:1", "4", "x"), ("h:1", "4", "4"), ("h:1", "0", "0")]
)
def test_impossible_process_number_is_a_user_error(monkeypatch, values):
    with pytest.raises(UserError, match="LAUNCH_PROCESS"):
        place(monkeypatch, *values)


@pytest.fixture
def handler_before():
    """The handler of SIGTERM, which is restored when the test has ended."""
    before = signal.getsignal(signal.SIGTERM)
    yield before
    signal.signal(signal.SIGTERM, before)


def test_sigterm_ends_a_worker_until_the_loop_first_asks_and_is_a_stop_request_then(handler_before):
    stop_requested = StopSignal()
    assert signal.getsignal(signal.SIGTERM) == handler_before
    assert [stop_requested(), stop_requested()] == [False, False]
    signal.raise_signal(signal.SIGTERM)
    assert [stop_requested(), stop_requested()] == [True, True]


def planned(platform):
    return SimpleNamespace(
        cluster="mine", processes=1, devices_per_process=jax.local_device_count(), platform=platform
    )


def test_a_node_with_gpus_and_a_jax_without_cuda_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(worker, "num_nvidia_gpus", lambda: 8)
    with pytest.raises(
        UserError, match=r"has 8 NVIDIA GPUs, but its jax is installed without CUDA: pip install"
    ):
        worker._verify(planned("gpu"), jax)


def test_a_node_without_gpus_is_not_the_planned_one(monkeypatch):
    monkeypatch.setattr(worker, "num_nvidia_gpus", lambda: 0)
    with pytest.raises(UserError, match="local devices of platform cpu; the plan for cluster"):
        worker._verify(planned("gpu"), jax)
    worker._verify(planned("cpu"), jax)
