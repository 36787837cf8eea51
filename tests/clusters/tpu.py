"""A TPU slice of four VMs on this machine: network namespaces, and in each an sshd and a metadata server.

Everything lives in one folder and in namespaces of its own; nothing of the machine's configuration is
read or written. The VMs share this machine's files, but for /run, /var/log, a few of /etc, and root's
home, which is a small disk in each. This machine is the laptop that reaches them.
`python -m tests.clusters.tpu` raises it until Enter is pressed.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.clusters import network
from tests.clusters.network import Network
from tests.clusters.runs import wait_until
from tests.metadata import ADDRESS as METADATA

NAMES = tuple(f"t{k}" for k in range(4))
FIRST = 21
"""Last part of the first one's address."""
PROGRAMS = ("sshd", "ssh", "ssh-keygen", "ip", "nsenter", "unshare")
REPOSITORY = Path(__file__).parents[2]
READY_SECONDS = 60

SSHD = """\
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
PidFile none
Subsystem sftp internal-sftp
"""

# For a root whose home is elsewhere, and who may log in with a key; sshd drops its rights to a user `sshd`.
PASSWD = "root:x:0:0:root:{folder}/home:/bin/bash\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\n"
SHADOW = "root:*:::::::\nsshd:!:::::::\n"

SERVICE_ACCOUNT = {
    "aliases": ["default"],
    "email": "test@test.iam.gserviceaccount.com",
    "scopes": ["https://www.googleapis.com/auth/cloud-platform"],
    "token": json.dumps({"access_token": "test", "expires_in": 3600, "token_type": "Bearer"}),
}

BOOT = f"""\
hostname "$1"
mount --bind "$2/boot_id" {network.BOOT_ID}
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=755 log /var/log
mkdir /run/sshd; touch /var/log/lastlog
mount -t tmpfs -o "mode=700,size=$3" home "$2/home"
for file in passwd shadow hosts; do mount --bind "$2/$file" "/etc/$file"; done
exec "$4" -m tests.metadata "$2/metadata.json"
"""

TPU_ENV = """\
ACCELERATOR_TYPE: 'v4-32'
CHIPS_PER_HOST_BOUNDS: '2,2,1'
HOST_BOUNDS: '1,1,4'
WORKER_ID: '{k}'
ZONE: 'us-central2-b'
"""


def missing() -> str | None:
    """Why it cannot be raised here, or None."""
    return network.missing(PROGRAMS)


@dataclass(frozen=True)
class Machine:
    """A VM, as the Cloud TPU API knows it."""

    name: str
    internal_address: str
    external_address: str
    host_key: str
    """The public one of its sshd: type and key, as known_hosts has them behind the address."""


class Slice:
    """The running VMs, numbered as the slice's workers."""

    def __init__(self, folder: Path, network: Network, home_size: str):
        self.folder = folder
        self.here, self.hosts = network.here, network.hosts
        self.home_size = home_size
        """As tmpfs has it. A full disk takes that much of this machine's memory."""
        self.machines: list[Machine] = []
        self._booted: list[subprocess.Popen[bytes]] = []
        """The metadata servers, which hold the VMs' namespaces."""
        self._sshds: dict[int, subprocess.Popen[bytes]] = {}

    # Raise and end

    def raise_(self) -> None:
        for k, host in enumerate(self.hosts):
            self._write_configuration(k)
            key = (self._of(k) / "host_key.pub").read_text().strip()
            self.machines.append(Machine(host.name, host.address, host.address, key))
            self._booted.append(self._boot(k))
        for k, booted in enumerate(self._booted):
            assert booted.stdout is not None
            assert booted.stdout.readline(), (
                f"{self.hosts[k].name} has not booted: see {self._of(k)}/boot.log"
            )
            self.start_sshd(k)

    def end(self) -> None:
        for process in (*self._sshds.values(), *self._booted):
            process.kill()
            process.wait()

    def _of(self, k: int) -> Path:
        return self.folder / f"vm-{k}"

    def _write_configuration(self, k: int) -> None:
        folder, host = self._of(k), self.hosts[k]
        (folder / "home").mkdir(parents=True)
        names = {"127.0.0.1": "localhost", METADATA: "metadata.google.internal"}
        names |= {h.address: h.name for h in self.hosts}
        metadata = {
            "project": {"project-id": "test"},
            "instance": {
                "attributes": {
                    "accelerator-type": "v4-32",
                    "agent-worker-number": str(k),
                    "tpu-env": TPU_ENV.format(k=k),
                    "worker-network-endpoints": ",".join(f"unknown:unknown:{h.address}" for h in self.hosts),
                },
                "hostname": host.name,
                "maintenance-event": "NONE",
                "preempted": "FALSE",
                "service-accounts": {"default": SERVICE_ACCOUNT},
                "zone": "projects/1/zones/us-central2-b",
            },
        }
        for name, text in {
            "hosts": "".join(f"{address} {name}\n" for address, name in names.items()),
            "passwd": PASSWD.format(folder=folder),
            "shadow": SHADOW,
            "sshd_config": SSHD.format(folder=folder, address=host.address),
            "authorized_keys": "",
            "boot_id": f"{host.boot_id}\n",
            "metadata.json": json.dumps(metadata),
        }.items():
            (folder / name).write_text(text)
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", folder / "host_key"], check=True
        )

    def _boot(self, k: int) -> subprocess.Popen[bytes]:
        host, folder = self.hosts[k], self._of(k)
        network.ip("-n", host.namespace, "address", "add", f"{METADATA}/32", "dev", "lo", check=True)
        with (folder / "boot.log").open("ab") as log:
            return subprocess.Popen(
                host.inside("unshare", "--uts", "--mount", "sh", "-ec", BOOT, "sh",
                            host.name, str(folder), self.home_size, sys.executable),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log,
                cwd=REPOSITORY, start_new_session=True,
            )  # fmt: skip

    def start_sshd(self, k: int) -> None:
        sshd = shutil.which("sshd")
        assert sshd is not None  # it starts itself anew for each connection, by its whole path
        with (self._of(k) / "sshd.log").open("ab") as log:
            self._sshds[k] = subprocess.Popen(
                self.inside(k, sshd, "-D", "-e", "-f", str(self._of(k) / "sshd_config")),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(
            lambda: _answers(self.hosts[k].address), f"sshd: see {self._of(k)}/sshd.log", READY_SECONDS
        )

    def stop_sshd(self, k: int) -> None:
        """No new connections; those that are there stay."""
        self._sshds[k].kill()
        self._sshds[k].wait()

    # Use

    def authorize(self, k: int, public_keys: Iterable[str]) -> None:
        """Let these keys in, and no others."""
        (self._of(k) / "authorized_keys").write_text("".join(f"{key.strip()}\n" for key in public_keys))

    def set_metadata(self, k: int, path: str, value: Any) -> None:
        """Such as instance/preempted."""
        file = self._of(k) / "metadata.json"
        metadata = json.loads(file.read_text())
        *above, name = path.split("/")
        place = metadata
        for part in above:
            place = place.setdefault(part, {})
        place[name] = value
        new = file.with_suffix(".new")
        new.write_text(json.dumps(metadata))
        new.replace(file)

    def set_attributes(self, k: int, attributes: dict[str, str]) -> None:
        for name, value in attributes.items():
            self.set_metadata(k, f"instance/attributes/{name}", value)

    def home_there(self, k: int) -> Path:
        """The VM's `~`, as the VM calls it."""
        return self._of(k) / "home"

    def home(self, k: int) -> Path:
        """The VM's `~`, as this machine reaches it."""
        return Path(f"/proc/{self._booted[k].pid}/root{self._of(k)}/home")

    def pids(self, k: int) -> set[int]:
        """What runs there, but for its sshd and metadata server; numbers are this machine's."""
        return self.hosts[k].pids() - {self._booted[k].pid, self._sshds[k].pid}

    def kill(self, k: int) -> None:
        """End everything that runs there."""
        while pids := self.pids(k):  # which may start others meanwhile
            network.kill(pids)

    def wipe(self, k: int) -> None:
        """What is left of a VM that was deleted: nothing runs, its home is empty."""
        self.kill(k)
        self.run(k, "find", str(self._of(k) / "home"), "-mindepth", "1", "-delete")

    def fill_disk(self, k: int, leave_bytes: int) -> None:
        """Leave so much of the home's disk, by a file ~/filler."""
        with (self.home(k) / "filler").open("wb") as f:
            disk = os.statvfs(self.home(k))
            os.posix_fallocate(f.fileno(), 0, disk.f_bavail * disk.f_bsize - leave_bytes)

    def cut_off(self, k: int) -> None:
        """Take the VM off the network; what runs there runs on."""
        self.hosts[k].cut_off()

    def reconnect(self, k: int) -> None:
        self.hosts[k].reconnect()

    def block_port(self, k: int, port: int) -> None:
        """As a firewall does before a VM: who connects waits in vain, and connections that are there hang."""
        self._rule(k, "add", port)

    def unblock_port(self, k: int, port: int) -> None:
        self._rule(k, "delete", port)

    def _rule(self, k: int, change: str, port: int) -> None:
        # No answer leaves; what the VM tells itself is routed before, in the table of rule 0.
        network.ip(
            "-n", self.hosts[k].namespace, "rule", change, "pref", "1", "ipproto", "tcp", "sport", str(port),
            "blackhole", check=True,
        )  # fmt: skip

    def run(self, k: int, *command: str) -> str:
        """What a command prints in a VM."""
        return subprocess.run(self.inside(k, *command), check=True, capture_output=True, text=True).stdout

    def inside(self, k: int, *command: str) -> list[str]:
        """The command line of a command in a VM."""
        return ["nsenter", f"--target={self._booted[k].pid}", "--net", "--uts", "--mount", *command]


def _answers(address: str) -> bool:
    with suppress(OSError), socket.create_connection((address, 22), 1):
        return True
    return False


@contextmanager
def raised(home_size: str = "256m") -> Iterator[Slice]:
    with (
        tempfile.TemporaryDirectory(prefix="podlaunch-tpu-", ignore_cleanup_errors=True) as folder,
        network.raised(NAMES, first=FIRST) as hosts,
    ):
        slice_ = Slice(Path(folder), hosts, home_size)
        try:
            slice_.raise_()
            yield slice_
        finally:
            slice_.end()


def main() -> None:
    if reason := missing():
        raise SystemExit(reason)
    with raised() as slice_:
        keys = [path.read_text() for path in Path.home().glob(".ssh/*.pub")]
        for k, machine in enumerate(slice_.machines):
            slice_.authorize(k, keys)
            print(f"ssh root@{machine.external_address}  # {machine.name}", flush=True)  # noqa: T201
        input()


if __name__ == "__main__":
    main()
