"""A real SLURM of four nodes on this machine: network namespaces, munge, slurmctld and a slurmd a node.

Everything lives in one folder and in namespaces of its own; nothing of the machine's configuration is
read or written, and another may stand beside it. This machine is the login node. The nodes share this machine's files, but for /etc/hosts and one folder that stands for
each node's local disk. `python -m tests.clusters.slurm` raises it until Enter is pressed.
"""

import os
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.clusters import network
from tests.clusters.network import Network

CONTROLLER = "ctl"
NODES = ("n1", "n2", "n3-ib", "rack1n4")  # as sites call them
FIRST = 10
"""Last part of the address of the first host, which is the controller's."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "ip", "nsenter", "unshare")
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
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE
PartitionName=scavenge Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=CANCEL GraceTime=0
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
PartitionName=short Nodes=ALL MaxTime=2 PriorityTier=1
"""


def missing() -> str | None:
    """Why it cannot be raised here, or None."""
    return network.missing(PROGRAMS)


class Slurm:
    """The running cluster, as its login node sees it."""

    def __init__(self, folder: Path, network: Network):
        self.folder = folder
        self.hosts = {host.name: host for host in network.hosts}
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self.local_disk = folder / "local-disk"
        """A folder that is another one on each node and on the login node."""
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    # Raise and end

    def raise_(self) -> None:
        for name in ("state", "local-disk"):
            (self.folder / name).mkdir()
        self._munge()
        self._write_configuration()
        script = f"hostname {CONTROLLER}; exec slurmctld -D -c -i"
        self._start("slurmctld", CONTROLLER, ["unshare", "--uts", "sh", "-c", script])
        for node in NODES:
            (self.folder / f"boot-id-{node}").write_text(f"{self.hosts[node].boot_id}\n")
            self.start_node(node)
        self.wait_until_idle()

    def end(self) -> None:
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
            daemon.wait()

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
            f"NodeName={node} NodeAddr={self.hosts[node].address} CPUs=2 RealMemory=4000 Gres=gpu:2"
            for node in NODES
        )
        address = self.hosts[CONTROLLER].address
        conf = CONF.format(controller=CONTROLLER, address=address, folder=self.folder, nodes=nodes)
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "gres.conf").write_text(
            f"NodeName={','.join(NODES)} Name=gpu File={self.folder}/gpu[0-1]\n"
        )
        for gpu in range(2):  # device files are all that SLURM looks at
            os.mknod(self.folder / f"gpu{gpu}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        hosts = [f"{host.address} {host.name}" for host in self.hosts.values()]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts, ""]))

    def start_node(self, node: str) -> None:
        script = (
            f'hostname "$1"; mount --bind "$2/boot-id-$1" {network.BOOT_ID}; mount --bind "$2/hosts" /etc/hosts; '
            'mount -t tmpfs local "$2/local-disk"; exec slurmd -D -N "$1" -f "$2/slurm.conf"'
        )
        self._start(
            node, node, ["unshare", "--uts", "--mount", "sh", "-c", script, "sh", node, str(self.folder)]
        )

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
            if states == ["idle"] * len(NODES) and not self.run("squeue", "--noheader", check=False).strip():
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
def raised() -> Iterator[Slurm]:
    with (
        tempfile.TemporaryDirectory(prefix="podlaunch-slurm-", ignore_cleanup_errors=True) as folder,
        network.raised((CONTROLLER, *NODES), first=FIRST) as hosts,
    ):
        slurm = Slurm(Path(folder), hosts)
        try:
            slurm.raise_()
            yield slurm
        finally:
            slurm.end()


if __name__ == "__main__":
    if reason := missing():
        raise SystemExit(reason)
    with raised() as slurm:
        print(f"export SLURM_CONF={slurm.environment['SLURM_CONF']}", flush=True)
        input()
