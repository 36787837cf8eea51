"""Second act of a remote gang: bring code and Python to the hosts, check them, and start an agent on each."""

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from configs.clusters import TpuCluster
from configs.errors import UserError
from launcher.accelerators import megascale_environment
from launcher.host import bootstrap
from launcher.host.agent import FOLDER
from launcher.host.process import host_program
from launcher.providers import Machine
from launcher.remote import shipping
from launcher.remote.attempt import RemoteAttempt
from launcher.remote.ssh import HostError, Ssh, last_line
from launcher.rundir import run_id

MEGASCALE_PORT = 8080  # libtpu's default
CLOCK_SECONDS = 60.0


def check_secrets(cluster: TpuCluster) -> None:
    """Raises UserError where this machine's environment lacks a secret of the workers."""
    missing = [name for name in cluster.secrets if name not in os.environ]
    if missing:
        raise UserError(
            f"secrets = {', '.join(missing)}: not in the environment; export what the workers are to get"
        )


def module_command(
    cluster: TpuCluster, folder: str, python: str, program: str, *arguments: str
) -> tuple[str, ...]:
    """The command of a program of launcher/host/, from the code in `folder` on a host."""
    variables = [f"{name}={value}" for name, value in host_environment(cluster, folder).items()]
    return ("env", *variables, *host_program(program, *arguments, python=python))


def host_environment(cluster: TpuCluster, folder: str) -> dict[str, str]:
    """The cluster's variables; our code comes before whatever else they put on the module path."""
    path = [f"{folder}/code", *filter(None, [cluster.environment.get("PYTHONPATH")])]
    return cluster.environment | {"PYTHONPATH": ":".join(path)}


class Preparation:
    """The start of one attempt on `machines`, one process on each."""

    def __init__(self, attempt: RemoteAttempt, ssh: Ssh, name: str, machines: list[Machine]):
        self._attempt, self._ssh, self._name, self._machines = attempt, ssh, name, machines
        self._plan, self._run, self._cluster = attempt.plan, attempt.run, attempt.cluster
        self._folder = f"{FOLDER}/{run_id(self._plan.run_directory)}"

    def start(self) -> bool:
        """Start the agents; False where the hosts are about to be taken away. Raises HostError and UserError."""
        attempt, ssh = self._attempt, self._ssh
        check_secrets(self._cluster)
        if len(self._machines) != self._plan.hosts:
            raise UserError(
                f"{self._name} has {len(self._machines)} VMs; cluster {self._plan.cluster} has {self._plan.hosts}: "
                "name the cluster that this TPU is"
            )
        with attempt.timed("ssh"):
            attempt.report_phase(f"reaching {self._plan.hosts} hosts by ssh")
            probes = ssh.each(self._probe)
        folders = [probe["folder"] for probe in probes]
        with attempt.timed("copy"):
            copied_bytes = self._copy(probes)
        with attempt.timed("environment"):
            # All at once: the hosts have the work, and this machine only waits.
            pythons = ssh.each(lambda p: self._python(p, folders[p]), at_once=self._plan.hosts)
        with attempt.timed("checks"):
            attempt.report_phase("checking the hosts")
            coordinator, notice = self._preflight(folders, pythons)
        if notice:
            attempt.report_phase(
                f"not on these hosts: {notice}; waiting for what becomes of them", queued=True
            )
            return False
        with attempt.timed("start"):
            attempt.report_phase("starting the workers")
            ssh.each(lambda p: self._start_agent(p, folders[p], pythons[p], coordinator))
        info = {
            "tpu": self._name,
            "agents": [[folder, python] for folder, python in zip(folders, pythons, strict=True)],
            "start_seconds": attempt.seconds,
            "copied_bytes": copied_bytes,
        }
        attempts = self._run.attempts
        attempts.write_info(attempt.number, attempts.info(attempt.number) | info)
        return True

    def _probe(self, process: int) -> dict[str, Any]:
        """What the host is and has, as bootstrap.py tells. Raises HostError where its disk or clock is no good."""
        self._attempt.check_stopped()
        begun = time.time()
        command = bootstrap_command("probe", self._folder)
        probe = json.loads(self._ssh.run(process, *command, seconds=self._cluster.contact_seconds))
        host, needed = self._machines[process].internal, self._cluster.min_disk_gib
        if probe["disk_bytes"] < needed * 2**30:
            raise HostError(
                process, host,
                f"{probe['home']} has {probe['disk_bytes'] / 2**30:.1f} GiB free, min_disk_gib = {needed:g}: make room "
                "there, or lower it", is_users=True,
            )  # fmt: skip
        if not begun - CLOCK_SECONDS < probe["time"] < time.time() + CLOCK_SECONDS:
            raise HostError(
                process, host,
                f"its clock is {probe['time'] - begun:+.0f} s off this machine's: Google's services would refuse one "
                "of them; set the wrong one", is_users=True,
            )  # fmt: skip
        return dict(probe)

    def _copy(self, probes: list[dict[str, Any]]) -> int:
        """Bring each host the files that it lacks; the number of bytes sent to all of them."""
        packed = self._run.code()
        if not packed:
            raise UserError(
                f"{self._run.location} has no code.tar.gz, from which hosts get the code: `launch` it anew"
            )
        code = shipping.CodeArchive(packed)
        deltas: dict[str, bytes | None] = {}
        for probe in probes:  # most hosts lack the same files
            deltas.setdefault(_digests(probe), code.delta(probe["files"]))
        tars = [deltas[_digests(probe)] for probe in probes]
        size = sum(len(tar) for tar in tars if tar)
        self._attempt.report_phase(
            f"copying the code to {sum(1 for tar in tars if tar)} hosts, {size / 2**20:.1f} MiB in all"
        )

        def copy(process: int) -> None:
            tar = tars[process]
            if tar is not None:
                self._attempt.check_stopped()
                self._ssh.run(process, *bootstrap_command("receive", self._folder), text=tar)

        self._ssh.each(copy)
        return size

    def _python(self, process: int, folder: str) -> str:
        """The Python of a host: the cluster's, or one that the lock file describes."""
        self._attempt.check_stopped()
        if self._cluster.python:
            return self._cluster.python
        self._attempt.report_phase("making the environment of the hosts from the lock file")
        environments = f"{Path(folder).parent}/environments"
        made = self._ssh.run(process, "sh", f"{folder}/code/{shipping.SETUP}", environments)
        return made.decode().strip().splitlines()[-1]

    def _preflight(self, folders: list[str], pythons: list[str]) -> tuple[str, str]:
        """The address at which the processes are to meet, and a host's eviction notice. Raises HostError."""
        rendezvous = self._machines[0].internal
        request = {"plan": json.loads(self._plan.to_json()), "address": rendezvous}

        def check(process: int) -> dict[str, Any]:
            self._attempt.check_stopped()
            text = json.dumps({**request, "process": process, "ports": first["ports"]}) + "\n"
            folder = folders[process]
            command = module_command(self._cluster, folder, pythons[process], "preflight", folder)
            report = json.loads(self._ssh.run(process, *command, text=text.encode()))
            return self._checked(process, report, first)

        with self._listening(folders[0], pythons[0], request) as first:
            others = self._ssh.each(check, range(1, self._plan.processes))
        for port in first["ports"]:
            if all(port in report["ports"] for report in others):
                return f"{rendezvous}:{port}", max(report["notice"] for report in (first, *others))
        process = next(
            p for p, report in enumerate(others, start=1) if first["ports"][0] not in report["ports"]
        )
        raise HostError(
            process, self._machines[process].internal,
            f"it does not reach host 0 at {rendezvous}, TCP ports {', '.join(map(str, first['ports']))}: let the "
            f"firewall of network {self._cluster.network or 'default'} pass TCP between the VMs", is_users=True,
        )  # fmt: skip

    @contextlib.contextmanager
    def _listening(self, folder: str, python: str, request: dict[str, Any]) -> Any:
        """The report of host 0, which listens at its ports meanwhile."""
        command = module_command(self._cluster, folder, python, "preflight", folder)
        process = self._ssh.open(0, *command)
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            process.stdin.write((json.dumps({**request, "process": 0}) + "\n").encode())
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise HostError(0, self._machines[0].internal, last_line(process.stderr.read()) or "?")
            report = json.loads(line)
            yield self._checked(0, report, report)
        finally:
            _close(process)

    def _checked(self, process: int, report: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
        """The report of a host. Raises HostError with its problems, and where it differs from host 0."""
        problems = list(report["problems"])
        if report["fingerprint"] != first["fingerprint"]:
            problems.append(
                f"it has other code or packages than host 0: {report['fingerprint']}, {first['fingerprint']}"
            )
        if problems:
            raise HostError(process, self._machines[process].internal, "; ".join(problems), is_users=True)
        return report

    def _start_agent(self, process: int, folder: str, python: str, coordinator: str) -> None:
        self._attempt.check_stopped()
        spec = {
            "plan": json.loads(self._plan.to_json()),
            "attempt": self._attempt.number,
            "process": process,
            "coordinator": coordinator,
            "environment": host_environment(self._cluster, folder) | self._slice_environment(process),
            "secrets": {name: os.environ[name] for name in self._cluster.secrets},
        }
        command = module_command(self._cluster, folder, python, "agent", "start", folder)
        self._ssh.run(process, *command, text=json.dumps(spec).encode())

    def _slice_environment(self, process: int) -> dict[str, str]:
        slices = self._machines[-1].slice + 1
        if slices == 1:
            return {}
        coordinator = f"{self._machines[0].internal}:{MEGASCALE_PORT}"
        return megascale_environment(coordinator, slices, self._machines[process].slice)


def bootstrap_command(command: str, folder: str) -> tuple[str, ...]:
    # The host has no file of ours yet, so the program itself is an argument.
    program = Path(bootstrap.__file__).read_text()
    return ("python3", "-I", "-c", program, command, folder)


def _digests(probe: dict[str, Any]) -> str:
    return json.dumps(probe["files"], sort_keys=True)


def _close(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    process.wait()
