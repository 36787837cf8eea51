"""Commands on many hosts at once, by OpenSSH with the user's own configuration and ssh agent.

All commands on a host share one connection. The provider names the host keys; where it names none, the key of the
first connection is kept under the host's alias.
"""

import contextlib
import resource
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from configs.clusters import TpuCluster
from configs.errors import UserError
from configs.files import temporary_folder
from launcher.providers import Machine

CONNECT_SECONDS = 10
# ssh gives a connection up after three unanswered messages at this interval.
ALIVE_SECONDS = 5
# Each is a process of ssh on the user's laptop.
MAX_PARALLEL = 32
MAX_OPEN_FILES = 10240  # macOS allows no more
UNREACHABLE = 255  # ssh's own exit code, where no command was run
RETRY_SECONDS = 2.0
Result = TypeVar("Result")


class HostError(Exception):
    """A host that cannot be used, and why."""

    def __init__(self, process: int, host: str, message: str, *, is_users: bool = False):
        super().__init__(message)
        self.process, self.host = process, host
        self.is_users = is_users
        """The user has to mend it: another attempt would fail the same way."""


class Ssh:
    """Connections to the machines of one cluster. The number of a process is the index of its machine."""

    def __init__(self, cluster: TpuCluster, machines: Sequence[Machine], folder: Path):
        self.machines = machines
        self._cluster, self._folder = cluster, folder
        lines = [f"{machine.alias} {key}\n" for machine in machines for key in machine.host_keys]
        (folder / "known_hosts").write_text("".join(lines))

    def error(self, process: int, message: str, *, is_users: bool = False) -> HostError:
        """A HostError with the process and the internal address of a machine."""
        return HostError(process, self.machines[process].internal, message, is_users=is_users)

    def address(self, process: int) -> str:
        """Raises HostError where the host has no address of the kind that `reach` asks for."""
        machine = self.machines[process]
        if self._cluster.reach != "external":
            return machine.internal
        if machine.external is None:
            raise self.error(
                process, "it has no external address; set reach to internal or iap", is_users=True
            )
        return machine.external

    def command(self, process: int, *remote: str, terminal: bool = False) -> list[str]:
        """The command line of a command on a host, or of a shell there."""
        machine, cluster = self.machines[process], self._cluster
        checked = "yes" if machine.host_keys else "accept-new"
        options = [
            *cluster.ssh_options,  # first, since ssh takes the first value of each option
            f"HostKeyAlias={machine.alias}",
            f"UserKnownHostsFile={self._folder}/known_hosts",
            f"StrictHostKeyChecking={checked}",
            f"ConnectTimeout={CONNECT_SECONDS}",
            f"ServerAliveInterval={ALIVE_SECONDS}",
            "ControlMaster=auto",
            f"ControlPath={self._folder}/%C",
            "ControlPersist=600",
            *([] if terminal else ["BatchMode=yes"]),
            *_identity(cluster),
            *([f"ProxyCommand={_tunnel(cluster)}"] if cluster.reach == "iap" else []),
        ]
        return [
            "ssh",
            *(part for option in options for part in ("-o", option)),
            *(["-l", cluster.ssh_user] if cluster.ssh_user else []),
            *(["-t"] if terminal and remote else []),
            "--",
            self.address(process),
            *([shlex.join(remote)] if remote else []),
        ]

    def run(
        self, process: int, *remote: str, text: bytes = b"", seconds: float = 60.0, num_lines: int = 1
    ) -> bytes:
        """Standard output of a command on a host; a connection is tried for `seconds`.

        Raises HostError, with the last `num_lines` that the command wrote to standard error.
        """
        deadline = time.monotonic() + seconds
        while True:
            done = subprocess.run(
                self.command(process, *remote),
                input=text,
                capture_output=True,
                start_new_session=True,  # so that Ctrl-C reaches the launcher alone
            )
            if done.returncode == 0:
                return done.stdout
            lines = last_lines(done.stderr, num_lines)
            message = lines[-1] if lines else f"{remote[0]} ends with exit code {done.returncode}"
            if done.returncode != UNREACHABLE:
                raise self.error(process, "\n            | ".join([message, *lines[:-1]]))
            if b"Host key verification failed" in done.stderr:
                message = "its host key is not the one that the provider tells: something else answers at"
                raise self.error(process, f"{message} {self.address(process)}", is_users=True)
            if time.monotonic() > deadline:
                raise self.error(process, f"not reached by ssh in {seconds:.0f} s: {message}")
            time.sleep(RETRY_SECONDS)  # a VM that was just created refuses connections for a while

    def open(self, process: int, *remote: str) -> subprocess.Popen[bytes]:
        """A command on a host, with pipes to it."""
        return subprocess.Popen(
            self.command(process, *remote),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def each(
        self,
        work: Callable[[int], Result],
        processes: Sequence[int] | None = None,
        parallel: int = MAX_PARALLEL,
    ) -> list[Result]:
        """The results of `work` for each process, in order; `parallel`: how many run at the same time.

        Raises the HostError of the first process in order that has one.
        """
        numbers = range(len(self.machines)) if processes is None else processes
        with ThreadPoolExecutor(parallel, thread_name_prefix="ssh") as pool:
            futures = [pool.submit(work, number) for number in numbers]
        errors = [error for future in futures if (error := future.exception())]
        if errors:
            if len(errors) > 1:
                errors[0].add_note(f"and {len(errors) - 1} more hosts")
            raise errors[0]
        return [future.result() for future in futures]


@contextlib.contextmanager
def connected(cluster: TpuCluster, machines: Sequence[Machine]) -> Iterator[Ssh]:
    """Connections that are closed at the end of the context."""
    # Each host takes three pipes, and macOS allows 256 open files by default.
    _, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(allowed, MAX_OPEN_FILES), allowed))
    # Not below the user's TMPDIR: the path of a socket has room for about 100 characters.
    with temporary_folder("ssh", Path("/tmp"), _close_connections) as folder:  # noqa: S108 (a folder of the user's own)
        yield Ssh(cluster, machines, folder)


def _close_connections(folder: Path) -> None:
    """End the processes of ssh that hold the shared connections, which outlive the launcher for ten minutes."""
    for socket in folder.glob("*"):
        if socket.is_socket():
            subprocess.run(["ssh", "-o", f"ControlPath={socket}", "-O", "exit", "-"], capture_output=True)


def _identity(cluster: TpuCluster) -> list[str]:
    """The key that the hosts accept, and no other: an agent offers all of its keys, and sshd gives up after six."""
    key = key_file(cluster)
    # Where only the public half is there, the agent has the private one.
    if not key.exists() and not key.with_name(f"{key.name}.pub").exists():
        return []
    return [f'IdentityFile="{key}"', "IdentitiesOnly=yes"]


def key_file(cluster: TpuCluster) -> Path:
    return Path(cluster.ssh_key or "~/.ssh/google_compute_engine").expanduser()


def public_key(cluster: TpuCluster) -> str:
    """The user's public key. The default key is made if it is absent, without a passphrase, as gcloud does it.

    Raises UserError where the public half is missing.
    """
    file = key_file(cluster)
    public = file.with_name(f"{file.name}.pub")
    if not file.exists() and not public.exists() and cluster.ssh_key is None:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "podlaunch", "-f", str(file)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    if not public.exists():
        raise UserError(f"ssh_key = {file}: there is no {public}; name a key with its public half beside it")
    return public.read_text().strip()


def _tunnel(cluster: TpuCluster) -> str:
    """The proxy command for Identity-Aware Proxy (https://cloud.google.com/iap/docs/using-tcp-forwarding)."""
    settings = shlex.join([
        f"--project={cluster.project}", f"--region={''.join(cluster.zones[:1]).rpartition('-')[0]}",
        f"--network={cluster.network or 'default'}", f"--dest-group={cluster.iap_group}",
    ])  # fmt: skip
    # ssh would put another setting, such as the user's name for %r, unquoted into what it has a shell execute.
    return f"gcloud compute start-iap-tunnel %h %p --listen-on-stdin {settings.replace('%', '%%')}"


def last_lines(stderr: bytes, count: int = 1) -> list[str]:
    """The last lines that are not empty."""
    lines = [line.strip() for line in stderr.decode(errors="replace").splitlines()]
    return list(filter(None, lines))[-count:]
