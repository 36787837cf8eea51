"""The command lines of ssh as OpenSSH parses them, and the handling of hosts that do not answer."""

import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from configs.clusters import TpuCluster
from configs.errors import UserError
from launcher.providers import Machine
from launcher.remote import ssh as module
from launcher.remote.ssh import HostError, Ssh, connected, key_file, public_key

KEY = "ssh-ed25519 AAAA"
MACHINES = [
    Machine(0, k, f"10.0.0.{k + 2}", f"198.51.100.{k + 2}", (KEY,), f"tpu-{k}.podlaunch") for k in range(3)
]
ODD = [
    "a b",
    "it's",
    'say "x"',
    "$HOME `id` $(id)",
    "~",
    "*",
    "a;b|c&d>e",
    "",
    "grün",
    "back\\slash",
    "two\nlines",
    "-o",
]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    home = tmp_path / "ho me"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.fixture
def to(tmp_path):
    """Makes an Ssh for three machines of a cluster with the given settings."""
    folder = tmp_path / "connections"
    folder.mkdir()

    def to(machines=MACHINES, **settings):
        return Ssh(TpuCluster(accelerator="v4-32", **settings), machines, folder)

    return to


def read(command):
    """The options that OpenSSH parses from a command line."""
    if not shutil.which("ssh"):
        pytest.skip("there is no ssh")
    done = subprocess.run(
        [command[0], "-G", "-F", "none", *command[1:]], capture_output=True, text=True, check=True
    )
    read = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition(" ")
        read.setdefault(name, []).append(value)
    return read


# The command line


def test_host_keys_from_the_provider_are_checked_strictly(to, tmp_path):
    found = read(to().command(1, "true"))
    assert found["hostname"] == ["198.51.100.3"]
    assert found["hostkeyalias"] == ["tpu-1.podlaunch"]
    assert found["stricthostkeychecking"] == ["true"]
    (known,) = found["userknownhostsfile"]
    lines = Path(known).read_text().splitlines()
    assert lines == [f"tpu-{k}.podlaunch {KEY}" for k in range(3)]


def test_unknown_host_key_is_accepted_at_the_first_connection_only(to):
    machine = Machine(0, 0, "10.0.0.2", "198.51.100.2", (), "tpu-0.podlaunch")
    assert read(to([machine]).command(0))["stricthostkeychecking"] == ["accept-new"]


def test_commands_ask_nobody_anything_and_share_a_connection(to):
    found = read(to().command(0, "true"))
    assert found["batchmode"] == ["yes"]
    assert (found["controlmaster"], found["controlpersist"]) == (["auto"], ["600"])
    assert len(found["controlpath"][0]) < 200
    assert found["connecttimeout"] == ["10"]


def test_shell_of_the_user_has_a_terminal_and_may_ask(to):
    assert "-t" not in to().command(0, terminal=True)  # ssh gives a shell one by itself
    command = to().command(0, "htop", terminal=True)
    assert read(command)["batchmode"] == ["no"]
    assert "-t" in command
    assert "-t" not in to().command(0, "true")


def test_user_and_key_are_those_of_the_cluster_whatever_its_path(to, home):
    key = home / "my key"
    found = read(to(ssh_user="jo", ssh_key=str(key)).command(0, "true"))
    assert str(key) not in found["identityfile"]  # it is not there
    key.touch()
    found = read(to(ssh_user="jo", ssh_key=str(key)).command(0, "true"))
    assert found["identityfile"] == [str(key)]
    assert found["user"] == ["jo"]


def test_options_of_the_cluster_come_before_ours(to):
    found = read(to(ssh_options=("ConnectTimeout=99", "Port=2222")).command(0, "true"))
    assert (found["connecttimeout"], found["port"]) == (["99"], ["2222"])


def test_internal_addresses_are_reached_where_that_is_asked_for(to):
    assert read(to(reach="internal").command(2, "true"))["hostname"] == ["10.0.0.4"]


def test_tunnel_is_gclouds(to):
    cluster = {"project": "my-project", "zone": "us-central2-b", "network": "net", "iap_group": "tpus"}
    found = read(to(reach="iap", **cluster).command(0, "true"))
    assert found["hostname"] == ["10.0.0.2"]
    assert found["proxycommand"] == [
        "gcloud compute start-iap-tunnel %h %p --listen-on-stdin --project=my-project --region=us-central2 "
        "--network=net --dest-group=tpus"
    ]


def test_host_without_an_external_address_is_the_users_to_mend(to):
    machine = Machine(0, 0, "10.0.0.2", None, (KEY,), "tpu-0.podlaunch")
    with pytest.raises(HostError, match="it has no external address; set reach to internal or iap") as found:
        to([machine]).command(0, "true")
    assert (found.value.process, found.value.host, found.value.is_users) == (0, "10.0.0.2", True)


def test_arguments_reach_a_command_as_they_are(to):
    *options, _, host, text = to().command(0, "printf", "%s\\0", *ODD)
    assert options[-1] != "--"
    assert host == "198.51.100.2"
    # What sshd does with it.
    done = subprocess.run(["sh", "-c", text], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == ODD


# Commands


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """Puts a shell script in place of `ssh`, with the command for the host in $command."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "ssh"
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)

    def remote(script):
        program.write_text(f"#!/bin/sh\ncd {folder}\nfor command; do :; done\n{script}\n")
        program.chmod(0o700)

    return remote


FAILS_TWICE = (
    'echo x >>tries; [ $(wc -l <tries) -gt 2 ] || { echo "timed out" >&2; exit 255; }; sh -c "$command"'
)


def test_run_passes_input_and_returns_output(to, remote):
    remote('exec sh -c "$command"')
    assert to().run(0, "tr", "a-z", "A-Z", text=b"hello") == b"HELLO"


def test_host_that_is_not_up_yet_is_tried_again(to, remote):
    remote(FAILS_TWICE)
    assert to().run(0, "echo", "up") == b"up\n"


def test_unreachable_host_is_reported_with_the_message_of_ssh(to, remote):
    remote('echo "ssh: connect to host 198.51.100.3 port 22: Connection timed out" >&2; exit 255')
    words = r"^not reached by ssh in 0 s: ssh: connect to host 198\.51\.100\.3 port 22: Connection timed out$"
    with pytest.raises(HostError, match=words) as found:
        to().run(1, "true", seconds=0.1)
    assert (found.value.process, found.value.host, found.value.is_users) == (1, "10.0.0.3", False)


def test_failed_command_is_reported_by_its_last_line_and_not_retried(to, remote, tmp_path):
    remote('echo x >>tries; exec sh -c "$command"')
    with pytest.raises(HostError, match=r"^No space left on device$"):
        to().run(0, "sh", "-c", "echo Traceback >&2; echo 'No space left on device' >&2; echo >&2; exit 1")
    with pytest.raises(HostError, match=r"^3\n            \| 2$"):
        to().run(0, "sh", "-c", "printf '1\\n2\\n3\\n' >&2; exit 1", num_lines=2)
    with pytest.raises(HostError, match=r"^false ends with exit code 1$"):
        to().run(0, "false")
    assert (tmp_path / "bin" / "tries").read_text() == "x\nx\nx\n"


def test_host_with_another_key_than_the_providers_is_not_talked_to(to, remote):
    remote('echo "Host key verification failed." >&2; exit 255')
    with pytest.raises(HostError, match=r"something else answers at 198\.51\.100\.2$"):
        to().run(0, "true")


@pytest.mark.linux
def test_ctrl_c_in_the_users_terminal_does_not_reach_commands(to, remote):
    remote('exec sh -c "$command"')
    session = to().run(0, "sh", "-c", "cut -d' ' -f6 /proc/$$/stat")
    assert int(session) != os.getsid(0)


def test_open_command_answers_its_input(to, remote):
    remote('exec sh -c "$command"')
    with to().open(0, "cat") as channel:
        channel.stdin.write(b"stop\n")
        channel.stdin.flush()
        assert channel.stdout.readline() == b"stop\n"


# Many hosts


def test_hosts_are_handled_in_parallel_with_results_in_order(to):
    all_of_them = threading.Barrier(3, timeout=10)

    def work(process):
        all_of_them.wait()
        return process

    assert to().each(work) == [0, 1, 2]
    assert to().each(lambda process: process, [2, 0]) == [2, 0]


def test_first_failure_in_order_stands_for_all(to):
    def work(process):
        if process:
            raise HostError(process, "h", f"of {process}")

    with pytest.raises(HostError, match="of 1") as found:
        to().each(work)
    assert found.value.__notes__ == ["and 1 more hosts"]


def test_connections_are_private_and_removed_at_the_end(remote, tmp_path):
    remote('echo "$*" >>calls')
    with connected(TpuCluster(accelerator="v4-32"), MACHINES) as ssh:
        folder = next(
            Path(part.partition("=")[2]).parent for part in ssh.command(0) if part.startswith("ControlPath=")
        )
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        with socket.socket(socket.AF_UNIX) as shared:
            shared.bind(str(folder / "shared"))
    assert not folder.exists()
    calls = (tmp_path / "bin" / "calls").read_text().splitlines()
    assert calls == [f"-o ControlPath={folder}/shared -O exit -"]


@pytest.mark.linux
def test_connections_of_a_launcher_that_was_killed_are_closed_by_the_next(remote, tmp_path):
    remote('echo "$*" >>calls')
    code = f"""
import os, signal, socket
from configs.clusters import TpuCluster
from launcher.remote.ssh import connected
with connected(TpuCluster(accelerator="v4-8"), []) as ssh:
    socket.socket(socket.AF_UNIX).bind(str(ssh._folder / "shared"))
    open({str(tmp_path / "left")!r}, "w").write(str(ssh._folder))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code])
    left = Path((tmp_path / "left").read_text())
    with connected(TpuCluster(accelerator="v4-32"), MACHINES):
        assert not left.exists()
    calls = (tmp_path / "bin" / "calls").read_text().splitlines()
    assert f"-o ControlPath={left}/shared -O exit -" in calls


# Keys


def test_one_key_alone_is_offered_if_it_is_there(to, home):
    assert read(to().command(0, "true"))["identitiesonly"] == ["no"]  # the agent may have it
    key = home / ".ssh" / "google_compute_engine"
    key.parent.mkdir()
    key.with_name(f"{key.name}.pub").touch()  # the private half is in the agent
    found = read(to().command(0, "true"))
    assert (found["identitiesonly"], found["identityfile"]) == (["yes"], [str(key)])


def test_key_is_made_where_gcloud_would_have_made_it(home):
    cluster = TpuCluster(accelerator="v4-32")
    made = public_key(cluster)
    assert made.startswith("ssh-ed25519 ")
    assert key_file(cluster) == home / ".ssh" / "google_compute_engine"
    assert stat.S_IMODE(key_file(cluster).stat().st_mode) == 0o600
    assert public_key(cluster) == made


def test_key_that_the_user_names_is_not_made(home):
    with pytest.raises(UserError, match=r"^ssh_key = .*/mine: there is no .*/mine\.pub; name a key"):
        public_key(TpuCluster(accelerator="v4-32", ssh_key=str(home / "mine")))
    assert not (home / "mine").exists()
