"""deploy/tpu/startup.sh, run under sh against the metadata server and the Cloud TPU API of the tests."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.host import bootstrap
from launcher.providers import Request
from launcher.providers.cloud_tpu import CloudTpu
from launcher.remote.shipping import STARTUP
from podlaunch import HOME
from tests import metadata, tpu_api
from tests.tpu_api import PROJECT, ZONE, Server

pytestmark = pytest.mark.linux

TOKEN = "hush-token"
REQUEST = Request(
    "podlaunch-x", "v4-16", "V4", "tpu-ubuntu2204-base", startup_script="#!/bin/sh\n", idle_minutes=1
)
LOOKS_PER_LIMIT = 6  # one each ten seconds
# Stands for `sleep`, so that no time passes: the first so many times, an agent shows a sign of life meanwhile.
SLEEP = """\
#!/bin/sh
echo "$1" >>"{looks}"
count=$(wc -l <"{looks}")
[ "$count" -gt {signs_of_life} ] || touch -d "@$count" "$ALIVE"
"""


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with tpu_api.in_use(monkeypatch, Server()) as server:
        yield server


class Vm:
    """A VM of a slice of the API's, with what its metadata server tells."""

    def __init__(self, folder: Path, api: Server, request: Request, worker: int, signs_of_life: int):
        self.folder, self.api = folder, api
        self.alive, self.hugepages = folder / "run" / "alive", folder / "hugepages"
        self.hugepages.write_text("madvise")
        tpu = CloudTpu(PROJECT, ZONE)
        tpu.create(request)
        until(lambda: tpu.condition(request.name).status == "ready")
        (node,) = api.nodes.values()
        token = {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"}
        attributes = node["metadata"] | {
            "agent-worker-number": str(worker),
            "accelerator-type": node["acceleratorType"],
        }
        accounts = {"service-accounts": {"default": {"token": json.dumps(token)}}}
        (folder / "metadata.json").write_text(
            json.dumps({"instance": {"attributes": attributes, **accounts}})
        )
        handler = type("Handler", (metadata._Handler,), {"file": folder / "metadata.json"})
        self._metadata = metadata._Server(("127.0.0.1", 0), handler)
        threading.Thread(target=self._metadata.serve_forever, args=(0.05,), daemon=True).start()
        environment = os.environ | {
            "METADATA": f"http://127.0.0.1:{self._metadata.server_address[1]}",
            "TPU_API": api.address,
            "ALIVE": str(self.alive),
            "HUGEPAGES": str(self.hugepages),
            "MAX_TRIES": "3",
            "POWEROFF": f"touch {folder}/off",
            "PATH": f"{folder}:{os.environ['PATH']}",
        }
        sleep = folder / "sleep"
        sleep.write_text(SLEEP.format(looks=folder / "looks", signs_of_life=signs_of_life))
        sleep.chmod(0o755)
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["sh", HOME / STARTUP], env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._metadata.shutdown()
        self._metadata.server_close()

    def deletions(self) -> int:
        return sum(1 for method, _ in self.api.log if method == "DELETE")


@pytest.fixture
def boot(tmp_path: Path, api: Server) -> Iterator[Callable[..., Vm]]:
    vms: list[Vm] = []

    def boot(request: Request = REQUEST, worker: int = 0, signs_of_life: int = 0) -> Vm:
        vms.append(Vm(tmp_path, api, request, worker, signs_of_life))
        return vms[-1]

    yield boot
    for vm in vms:
        vm.end()


def until(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_slice_that_nobody_uses_deletes_itself(boot, api):
    vm = boot()
    until(lambda: not api.queued_resources and not api.nodes)
    assert f"projects/{PROJECT}/locations/{ZONE}/queuedResources/podlaunch-x: HTTP 200" in vm.log.read_text()
    assert ("DELETE", f"/v2/projects/{PROJECT}/locations/{ZONE}/queuedResources/podlaunch-x") in api.log
    assert api.authorizations == {f"Bearer {TOKEN}"}
    assert TOKEN not in vm.log.read_text()
    assert api.rejected == []


def test_signs_of_life_keep_a_slice(boot, api, tmp_path):
    looks: list[int] = []
    count = tmp_path / "looks"
    api.after["queuedResources.delete"] = lambda: looks.append(len(count.read_text().split()))
    boot(signs_of_life=20)
    until(lambda: looks)
    assert looks[0] == 20 + LOOKS_PER_LIMIT


def test_a_refused_deletion_is_repeated_and_then_the_vm_powers_off(boot, api):
    api.fail_next(403, "Permission denied", method="queuedResources.delete", times=99)
    vm = boot()
    until((vm.folder / "off").exists)
    assert vm.deletions() == vm.log.read_text().count("HTTP 403") == 3
    assert "cannot be deleted" in vm.log.read_text()


@pytest.mark.parametrize(
    ("request_", "worker"),
    [(REQUEST, 1), (replace(REQUEST, idle_minutes=None), 0)],
    ids=["worker 1", "never"],
)
def test_other_workers_and_kept_slices_do_not_watch(boot, api, request_, worker):
    vm = boot(request_, worker)
    assert vm.process.wait(60) == 0
    assert (vm.alive.exists(), vm.deletions()) == (False, 0)


@pytest.mark.parametrize(("kind", "expected"), [("v4-16", "madvise"), ("v6e-16", "always\n")])
def test_hugepages_are_set_from_v5e_on(boot, tmp_path, api, kind, expected, monkeypatch):
    monkeypatch.setitem(tpu_api.ZONES, ZONE, ("v4", "v6e"))
    vm = boot(replace(REQUEST, accelerator_type=kind, idle_minutes=None))
    vm.process.wait(60)
    assert vm.hugepages.read_text() == expected


def test_a_sign_of_life_needs_a_vm_of_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(bootstrap, "ALIVE", str(tmp_path / "alive"))
    bootstrap.show_life()
    assert not (tmp_path / "alive").exists()
    (tmp_path / "alive").touch()
    os.utime(tmp_path / "alive", (0, 0))
    bootstrap.probe(str(tmp_path / "folder"))
    assert (tmp_path / "alive").stat().st_mtime > 0
