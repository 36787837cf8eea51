"""ssh to real VMs: what OpenSSH on both sides makes of the options that the launcher gives."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.clusters import TpuCluster
from launcher.providers import Machine
from launcher.remote.ssh import connected, public_key
from tests.clusters.tpu import Slice

pytestmark = pytest.mark.cluster
NUM_KEYS = 8
"""More than sshd lets a client try: MaxAuthTries is 6."""


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def agent(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An agent with many keys, as a developer has it."""
    socket = home / "agent"
    process = subprocess.Popen(["ssh-agent", "-D", "-a", socket], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()  # it listens
    monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
    for k in range(NUM_KEYS):
        key = home / f"key{k}"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        subprocess.run(["ssh-add", "-q", key], check=True)
    yield
    process.terminate()
    process.wait()


@pytest.mark.parametrize("where", ["in a file", "in the agent alone"])
def test_an_agent_with_many_keys_is_no_reason_to_be_refused(
    raised_vms: Slice, agent: None, home: Path, where: str
) -> None:
    cluster = TpuCluster(accelerator="v4-8", ssh_user="root")
    key = home / ".ssh" / "google_compute_engine"
    raised_vms.wipe(0)
    raised_vms.authorize(0, [authorized := public_key(cluster)])
    if where == "in the agent alone":
        subprocess.run(["ssh-add", "-q", key], check=True)
        key.unlink()
    vm = raised_vms.machines[0]
    machine = Machine(0, 0, vm.internal_address, vm.external_address, (vm.host_key,), "vm-0.podlaunch")
    # Neither the user's own configuration of ssh nor that of this machine is asked.
    plain = ["ssh", "-F", "none", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]  # fmt: skip
    refused = subprocess.run([*plain, f"root@{vm.external_address}", "true"], capture_output=True, text=True)
    assert "Too many authentication failures" in refused.stderr
    with connected(cluster, [machine]) as ssh:
        assert ssh.run(0, "hostname", seconds=5).decode().strip() == "t0"
    assert public_key(cluster) == authorized  # no other is made in its place
