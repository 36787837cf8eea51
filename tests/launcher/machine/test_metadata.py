"""What a TPU VM reads from the metadata server, and that other machines read nothing."""

import json
import threading

import pytest

from launcher.machine import metadata
from launcher.machine.metadata import TpuWorker, eviction_notice, get, tpu_worker
from tests.metadata import _Handler, _Server

TPU_ENV = "ACCELERATOR_TYPE: 'v4-32'\nNODE_ID: 'mine'\nTPU_PROCESS_BOUNDS: '1,1,4'\n"
SLICES = "MEGASCALE_SLICE_ID: '1'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.2'\n"


@pytest.fixture
def vm(tmp_path, monkeypatch):
    """Makes this process appear to run on a VM with the given instance metadata."""
    file = tmp_path / "metadata.json"
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"file": file}))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_address[1]}")
    yield lambda **instance: file.write_text(json.dumps({"instance": instance}))
    server.shutdown()
    server.server_close()


@pytest.fixture
def elsewhere(monkeypatch):
    """A machine without a metadata server."""
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")


def attributes(**changes):
    return {
        "agent-worker-number": "2",
        "worker-network-endpoints": ",".join(f"unknown:unknown:10.0.0.{k}" for k in range(2, 6)),
        "accelerator-type": "v4-32",
        "tpu-env": TPU_ENV,
    } | changes


def test_value_is_what_the_server_says_and_none_where_it_has_none(vm):
    vm(hostname="t1v-n-0", attributes={"empty": ""})
    assert get("hostname") == "t1v-n-0"
    assert get("attributes/empty") == ""
    assert get("attributes/absent") is None


def test_server_is_asked_by_its_own_protocol_and_never_through_a_proxy(vm, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    vm(hostname="t1v-n-0")  # the server refuses who does not send Metadata-Flavor
    assert get("hostname") == "t1v-n-0"


def test_machine_that_is_no_vm_of_a_slice_is_none(elsewhere):
    assert get("hostname") is None
    assert tpu_worker() is None
    assert eviction_notice() is None


def test_vm_without_tpus_is_none(vm):
    vm(hostname="a-vm", attributes={})
    assert tpu_worker() is None


def test_server_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(metadata, "TIMEOUT_SECONDS", 0.1)
    with _Server(("127.0.0.1", 0), _Handler) as silent:  # nobody accepts
        monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{silent.server_address[1]}")
        assert get("hostname") is None


def test_vm_knows_its_slice(vm):
    vm(attributes=attributes())
    assert tpu_worker() == TpuWorker(2, ("10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5"), "v4-32", 0, 1, None)


def test_addresses_may_be_bare(vm):
    vm(attributes=attributes(**{"worker-network-endpoints": "10.0.0.2,10.0.0.3"}))
    assert tpu_worker().addresses == ("10.0.0.2", "10.0.0.3")


def test_one_of_several_slices_knows_where_they_meet(vm):
    vm(attributes=attributes(**{"tpu-env": TPU_ENV + SLICES}))
    worker = tpu_worker()
    assert (worker.slice, worker.slices, worker.megascale_coordinator) == (1, 2, "10.0.0.2")


def test_accelerator_type_falls_back_to_tpu_env(vm):
    own = attributes()
    del own["accelerator-type"]
    vm(attributes=own)
    assert tpu_worker().accelerator_type == "v4-32"


@pytest.mark.parametrize(
    ("preempted", "event", "words"),
    [
        ("FALSE", "NONE", None),
        ("TRUE", "NONE", "this VM is being preempted"),
        ("FALSE", "TERMINATE_ON_HOST_MAINTENANCE", "maintenance of this VM is announced: TERMINATE_ON_HOST"),
    ],
)
def test_notice_is_of_a_vm_that_is_to_be_taken_away(vm, preempted, event, words):
    vm(**{"preempted": preempted, "maintenance-event": event})
    found = eviction_notice()
    assert found is None if words is None else found.startswith(words)


def test_vm_without_preemption_metadata_has_no_notice(vm):
    vm(hostname="t1v-n-0")
    assert eviction_notice() is None
