"""The TPU slice of the tests is one: four VMs with sshd, a home and metadata each, and what befalls them."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.clusters.network import BOOT_ID
from tests.clusters.runs import wait_until
from tests.clusters.tpu import Slice
from tests.gcs import Server

pytestmark = pytest.mark.cluster

METADATA = "http://metadata.google.internal/computeMetadata/v1/instance"


class Laptop:
    """ssh with a key that the VMs let in, and their own keys known."""

    def __init__(self, folder: Path, vms: Slice):
        self._vms, self._folder = vms, folder
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
        known = [f"{machine.external_address} {machine.host_key}\n" for machine in vms.machines]
        (folder / "known_hosts").write_text("".join(known))
        self.authorize()

    def authorize(self) -> None:
        for k in range(len(self._vms.machines)):
            self._vms.authorize(k, [(self._folder / "key.pub").read_text()])

    def ssh(self, k: int, command: str) -> subprocess.CompletedProcess[str]:
        options = [
            "StrictHostKeyChecking=yes", f"UserKnownHostsFile={self._folder}/known_hosts",
            "GlobalKnownHostsFile=none", "BatchMode=yes", "IdentitiesOnly=yes", "ConnectTimeout=1",
        ]  # fmt: skip
        address = self._vms.machines[k].external_address
        return subprocess.run(
            ["ssh", "-F", "none", "-i", self._folder / "key", *(f"-o{option}" for option in options),
             f"root@{address}", command],
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip

    def tell(self, k: int, command: str) -> str:
        done = self.ssh(k, command)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.fixture
def vms(raised_vms: Slice) -> Slice:
    """As another test may have left them, but empty."""
    for k in range(len(raised_vms.machines)):
        raised_vms.wipe(k)
    return raised_vms


@pytest.fixture
def laptop(vms: Slice, tmp_path_factory: pytest.TempPathFactory) -> Laptop:
    return Laptop(tmp_path_factory.mktemp("laptop"), vms)


def test_four_hosts_with_homes_of_their_own(vms, laptop):
    assert [laptop.tell(k, "hostname") for k in range(4)] == ["t0", "t1", "t2", "t3"]
    for k in range(4):
        laptop.tell(k, f"echo {k} > ~/mine")
    assert [laptop.tell(k, "ls ~; cat ~/mine") for k in range(4)] == [f"mine\n{k}" for k in range(4)]
    assert len({laptop.tell(k, "echo ~") for k in range(4)}) == 4
    assert len({laptop.tell(k, f"cat {BOOT_ID}") for k in range(4)}) == 4
    assert [(vms.home(k) / "mine").read_text() for k in range(4)] == ["0\n", "1\n", "2\n", "3\n"]
    assert laptop.tell(0, "getent hosts t3").split() == [vms.hosts[3].address, "t3"]


def test_key_that_is_not_authorized_is_refused(vms, laptop, tmp_path):
    other = Laptop(tmp_path, vms)
    assert "Permission denied" in laptop.ssh(0, "true").stderr
    assert other.tell(0, "hostname") == "t0"
    laptop.authorize()


def test_jax_is_there_and_the_laptop_is_reached(vms, laptop):
    server = Server(host=vms.here)
    server.put("a", b"object")
    script = (
        "import jax, sys, urllib.request as r; "
        f"print(jax.__name__, r.urlopen('{server.address}/storage/v1/b/bucket/o/a?alt=media').read())"
    )
    assert laptop.tell(2, f'{sys.executable} -c "{script}"') == "jax b'object'"
    server.close()


ASK = """
import sys, urllib.error, urllib.request
url, flavor = sys.argv[1:]
try:
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Metadata-Flavor": flavor})) as answer:
        print(answer.headers["ETag"], answer.read().decode())
except urllib.error.HTTPError as error:
    print("refused", error.code)
"""


def ask(vms: Slice, k: int, path: str, flavor: str = "Google") -> tuple[str, str]:
    """Tag and value of `instance/…`, or "refused" and the status."""
    tag, _, value = vms.run(k, sys.executable, "-c", ASK, f"{METADATA}/{path}", flavor).strip().partition(" ")
    return tag, value


def test_metadata(vms):
    tag, preempted = ask(vms, 1, "preempted")
    assert preempted == "FALSE"
    assert ask(vms, 1, "preempted", flavor="none") == ("refused", "403")
    assert ask(vms, 1, "attributes/absent") == ("refused", "404")
    assert [ask(vms, k, "attributes/agent-worker-number")[1] for k in range(4)] == ["0", "1", "2", "3"]
    assert '"preempted": "FALSE"' in ask(vms, 1, "?recursive=true&alt=json")[1]
    wait = f"preempted?wait_for_change=true&last_etag={tag}&timeout_sec="
    assert ask(vms, 1, wait + "0.1") == (tag, "FALSE")
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(ask, vms, 1, wait + "60")
        vms.set_metadata(1, "instance/preempted", "TRUE")
        assert waiting.result()[1] == "TRUE"
    assert ask(vms, 0, "preempted")[1] == "FALSE"
    vms.set_metadata(1, "instance/preempted", "FALSE")


def test_wiped_vm_runs_nothing_and_has_nothing(vms, laptop):
    laptop.tell(3, "mkdir -p ~/.cache/a; touch ~/.cache/a/b; setsid sleep 600 > /dev/null 2>&1 &")
    laptop.tell(2, "setsid sleep 600 > /dev/null 2>&1 &")
    wait_until(lambda: len(vms.pids(3)) == 1, "only what was detached is left")
    vms.wipe(3)
    assert vms.pids(3) == set()
    assert laptop.tell(3, "ls -A ~") == ""
    wait_until(lambda: len(vms.pids(2)) == 1, "only what was detached is left")
    vms.kill(2)


def test_full_disk(vms, laptop):
    vms.fill_disk(1, leave_bytes=1 << 20)
    full = laptop.ssh(1, "head -c 2M /dev/zero > ~/big")
    assert "No space left on device" in full.stderr
    assert laptop.tell(0, "head -c 2M /dev/zero > ~/big; stat -c %s ~/big") == str(2 << 20)
    vms.wipe(1)


def test_vm_that_is_not_reached(vms, laptop):
    vms.cut_off(2)
    assert "timed out" in laptop.ssh(2, "true").stderr
    vms.reconnect(2)
    assert laptop.tell(2, "hostname") == "t2"
    vms.block_port(2, 22)
    assert "timed out" in laptop.ssh(2, "true").stderr
    vms.unblock_port(2, 22)
    assert laptop.tell(2, "hostname") == "t2"
    vms.stop_sshd(2)
    assert "refused" in laptop.ssh(2, "true").stderr
    vms.start_sshd(2)
    assert laptop.tell(2, "hostname") == "t2"
