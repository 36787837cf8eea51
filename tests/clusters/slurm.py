"""A real SLURM on this machine, in two layouts: network namespaces, munge, slurmctld and a slurmd a node.

Everything lives in one folder and in namespaces of its own; nothing of the machine's configuration is
read or written, and another may stand beside it. This machine is the login node. The nodes share this machine's
files, but for /etc/hosts and one folder that stands for each node's local disk. `python -m tests.clusters.slurm`
raises the layout of four nodes until Enter is pressed; with `site` the one of two nodes that has what sites have.
"""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.clusters import network
from tests.clusters.network import Network

CONTROLLER = "ctl"
NODES = ("n1", "n2", "n3-ib", "rack1n4")  # as sites call them
SITE_NODES = ("gpu-a.rack1", "n2-ib")
FIRST = 10
"""Last part of the address of the first host, which is the controller's."""
PROGRAMS = (
    "munged",
    "slurmctld",
    "slurmd",
    "slurmdbd",
    "mariadbd",
    "sbatch",
    "srun",
    "ip",
    "nsenter",
    "unshare",
)
READY_SECONDS = 60

CONF = """\
ClusterName=podlaunch
SlurmctldHost={controller}({address})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=20
SlurmdTimeout=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
GresTypes=gpu
{nodes}
{layout}
"""
PLAIN = """\
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE
PartitionName=scavenge Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=CANCEL GraceTime=0
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=short Nodes=ALL MaxTime=2 PriorityTier=1
"""
SITE = """\
PartitionName=main Nodes=ALL Default=YES MaxTime=1-0 DefaultTime=60 MaxNodes=2 PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=10 MaxNodes=1 PriorityTier=10 PreemptMode=OFF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={address}
AccountingStoragePass={folder}/munge.socket
MessageTimeout=3
"""
DATABASE_DAEMON = """\
DbdHost={controller}
DbdAddr={address}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StorageType=accounting_storage/mysql
StorageUser=root
LogFile={folder}/slurmdbd.log
PidFile={folder}/slurmdbd.pid
"""
# Sites put one in front of SLURM's own. While there is a file `hold`, it ends only when somebody deletes that.
SBATCH = """\
#!/bin/sh
echo '*** Welcome to the cluster; budget used: 12 %'
{sbatch} "$@" || exit
while [ -e {folder}/hold ]; do sleep 0.05; done
echo 'Your job will be charged to: vision'
"""


@dataclass(frozen=True)
class Layout:
    nodes: tuple[str, ...]
    partitions: str
    is_site: bool = False
    """What sites have: accounting, a wrapped sbatch, and nodes that call themselves otherwise, by names that nobody
    resolves."""


FOUR_NODES = Layout(NODES, PLAIN)
SITE_LAYOUT = Layout(SITE_NODES, SITE, is_site=True)


def missing() -> str | None:
    """Why it cannot be raised here, or None."""
    return network.missing(PROGRAMS)


class Slurm:
    """The running cluster, as its login node sees it."""

    def __init__(self, folder: Path, network: Network, layout: Layout):
        self.folder, self.layout = folder, layout
        self.hosts = {host.name: host for host in network.hosts}
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self.local_disk = folder / "local-disk"
        """A folder that is another one on each node and on the login node."""
        self.small_disk = folder / "small-disk"
        """A disk of a megabyte, which all share, in the layout of a site."""
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    # Raise and end

    def raise_(self) -> None:
        for name in ("state", "local-disk", "small-disk", "programs"):
            (self.folder / name).mkdir()
        self._munge()
        self._write_configuration()
        if self.layout.is_site:
            self.run("mount", "-t", "tmpfs", "-o", "size=1M", "small", str(self.small_disk))
            self._wrap_sbatch()
            self._account()
        self.start_controller("-c", "-i")
        for node in self.layout.nodes:
            (self.folder / f"boot-id-{node}").write_text(f"{self.hosts[node].boot_id}\n")
            self.start_node(node)
        self.wait_until_idle()

    def end(self) -> None:
        for name in reversed(list(self._daemons)):
            self._kill(name)
        self.run("umount", "--lazy", str(self.small_disk), check=False)

    def start_controller(self, *options: str) -> None:
        self._start_named_host("slurmctld", "slurmctld", "-D", *options)

    def stop_controller(self) -> None:
        self._daemons["slurmctld"].terminate()  # it then saves its state, as where a site restarts it
        self._daemons["slurmctld"].wait()

    def _start_named_host(self, name: str, *command: str) -> None:
        script = f'hostname {CONTROLLER}; exec "$@"'
        self._start(name, CONTROLLER, ["unshare", "--uts", "sh", "-c", script, "sh", *command])

    def _kill(self, name: str) -> None:
        daemon = self._daemons[name]
        daemon.kill()
        daemon.wait()

    def _wrap_sbatch(self) -> None:
        wrapper = self.folder / "programs" / "sbatch"
        wrapper.write_text(SBATCH.format(sbatch=shutil.which("sbatch"), folder=self.folder))
        wrapper.chmod(0o755)
        self.environment["PATH"] = f"{wrapper.parent}:{os.environ['PATH']}"

    def _account(self) -> None:
        """A database of this cluster's own, slurmdbd, and this cluster in it."""
        data, socket = self.folder / "database", self.folder / "database.socket"
        fast = ("--innodb-flush-method=nosync", "--innodb-log-file-size=4M", "--innodb-buffer-pool-size=8M")
        self.run(
            "mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db",
            "--auth-root-authentication-method=normal", *fast,
        )  # fmt: skip
        self._start(
            "mariadbd", CONTROLLER,
            ["mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", f"--socket={socket}",
             "--skip-networking", f"--pid-file={data}.pid", *fast],
        )  # fmt: skip
        file = self.folder / "slurmdbd.conf"
        file.write_text(DATABASE_DAEMON.format(**self._places()))
        file.chmod(0o600)
        self._wait_for(socket.exists, "mariadbd")
        self.environment["MYSQL_UNIX_PORT"] = str(socket)
        self._start_named_host("slurmdbd", "slurmdbd", "-D")
        add = ("sacctmgr", "--immediate", "add", "cluster", "podlaunch")
        self._wait_for(lambda: self.run(*add, check=False), "slurmdbd")

    def _wait_for(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"{what} does not answer: see {self.folder}"
            time.sleep(0.05)

    def _places(self) -> dict[str, object]:
        return {"controller": CONTROLLER, "address": self.hosts[CONTROLLER].address, "folder": self.folder}

    def _munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.folder.chmod(0o755)  # munge wants its socket to be within everybody's reach
        self._start(
            "munged", CONTROLLER,
            ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.folder}/munge.socket",
             f"--pid-file={self.folder}/munged.pid", f"--log-file={self.folder}/munged.log",
             f"--seed-file={self.folder}/munge.seed"],
        )  # fmt: skip

    def _write_configuration(self) -> None:
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={self.hostname(node)} NodeAddr={self.hosts[node].address} "
            "CPUs=2 RealMemory=4000 Gres=gpu:2"
            for node in self.layout.nodes
        )
        places = self._places()
        conf = CONF.format(nodes=nodes, layout=self.layout.partitions.format(**places), **places)
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "gres.conf").write_text(
            f"NodeName={','.join(self.layout.nodes)} Name=gpu File={self.folder}/gpu[0-1]\n"
        )
        for gpu in range(2):  # device files are all that SLURM looks at
            os.mknod(self.folder / f"gpu{gpu}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        hosts = [] if self.layout.is_site else [f"{host.address} {host.name}" for host in self.hosts.values()]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))

    def hostname(self, node: str) -> str:
        """What a node calls itself."""
        return f"host{self.hosts[node].number}.internal" if self.layout.is_site else node

    def start_node(self, node: str) -> None:
        script = (
            f'hostname "$3"; mount --bind "$2/boot-id-$1" {network.BOOT_ID}; mount --bind "$2/hosts" /etc/hosts; '
            'mount -t tmpfs local "$2/local-disk"; exec slurmd -D -N "$1" -f "$2/slurm.conf"'
        )
        arguments = [node, str(self.folder), self.hostname(node)]
        self._start(node, node, ["unshare", "--uts", "--mount", "sh", "-c", script, "sh", *arguments])

    def _start(self, name: str, host: str, command: list[str]) -> None:
        with (self.folder / f"{name}.output").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                self.hosts[host].inside(*command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | self.environment,
                start_new_session=True,
            )

    # Use

    def run(self, *command: str, check: bool = True, environment: Mapping[str, str] = os.environ) -> str:
        """What a command prints on the login node."""
        done = subprocess.run(
            command, capture_output=True, text=True, env={**environment, **self.environment}
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def wait_until_idle(self) -> None:
        """All nodes are up, and no job is left."""
        deadline = time.monotonic() + READY_SECONDS
        while True:
            states = self.run(
                "sinfo", "--noheader", "--Node", "--partition=main", "--format=%T", check=False
            ).split()
            if (
                states == ["idle"] * len(self.layout.nodes)
                and not self.run("squeue", "--noheader", check=False).strip()
            ):
                return
            assert time.monotonic() < deadline, f"nodes are {states}: see {self.folder}"
            time.sleep(0.1)

    def cut_off(self, node: str) -> None:
        """Take the node off the network; what runs there runs on."""
        self.hosts[node].cut_off()

    def reconnect(self, node: str) -> None:
        self.hosts[node].reconnect()

    def on_node(self, node: str, *command: str) -> str:
        """Run a command on a node, in its namespaces."""
        pid = self._daemons[node].pid
        return self.run("nsenter", f"--target={pid}", "--net", "--uts", "--mount", *command)


@contextmanager
def raised(layout: Layout = FOUR_NODES) -> Iterator[Slurm]:
    with (
        tempfile.TemporaryDirectory(prefix="podlaunch-slurm-", ignore_cleanup_errors=True) as folder,
        network.raised((CONTROLLER, *layout.nodes), first=FIRST) as hosts,
    ):
        slurm = Slurm(Path(folder), hosts, layout)
        try:
            slurm.raise_()
            yield slurm
        finally:
            slurm.end()


if __name__ == "__main__":
    if reason := missing():
        raise SystemExit(reason)
    with raised(SITE_LAYOUT if "site" in sys.argv[1:] else FOUR_NODES) as slurm:
        for name, value in slurm.environment.items():
            print(f"export {name}={value}", flush=True)
        input()
