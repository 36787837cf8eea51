"""Second stage of a remote gang: bring code and Python to the hosts, check them, and start an agent on each."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.clusters import TpuCluster
from configs.errors import UserError
from launcher.accelerators import megascale_environment
from launcher.host import bootstrap
from launcher.host.agent import FOLDER, WorkerSpec
from launcher.host.process import host_program
from launcher.providers import Machine
from launcher.remote import shipping
from launcher.remote.attempt import RemoteAttempt
from launcher.remote.ssh import Ssh, last_lines
from launcher.rundir import run_id

SETUP_LINES = 10  # of the environment's script, whose cause is rarely in its last line
MEGASCALE_PORT = 8080  # libtpu's default
# Google's services refuse requests whose clock is off by more than some minutes.
CLOCK_SECONDS = 60.0


def check_secrets(cluster: TpuCluster) -> None:
    """Raises UserError where this machine's environment lacks a secret of the workers."""
    missing = [name for name in cluster.secrets if name not in os.environ]
    if missing:
        names = ", ".join(missing)
        raise UserError(f"secrets = {names}: not set in the environment of `launch`; export these variables")


def remote_program(cluster: TpuCluster, folder: str, python: str, name: str, *arguments: str) -> list[str]:
    """The command of a program of launcher/host/, from the code in `folder` on a host."""
    variables = [f"{key}={value}" for key, value in host_environment(cluster, folder).items()]
    return ["env", *variables, *host_program(name, *arguments, python=python)]


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
                "choose the --cluster that matches this TPU"
            )
        with attempt.timed("ssh"):
            attempt.report_phase(f"reaching {self._plan.hosts} hosts by ssh")
            probes = ssh.each(self._probe)
        folders = [probe["folder"] for probe in probes]
        with attempt.timed("copy"):
            copied_bytes = self._copy(probes)
        with attempt.timed("environment"):
            # On all hosts in parallel: each installs packages for minutes, and this machine only waits.
            pythons = ssh.each(lambda p: self._python(p, folders[p]), parallel=self._plan.hosts)
        with attempt.timed("checks"):
            attempt.report_phase("checking the hosts")
            coordinator, notice = self._preflight(folders, pythons)
        if notice:
            phase = f"not starting on these hosts: {notice}; waiting until they are gone or available again"
            attempt.report_phase(phase, queued=True)
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
        """What the host is and has, as bootstrap.py reports it. Raises HostError where its disk or clock is unfit."""
        self._attempt.check_stopped()
        started = time.time()
        command = bootstrap_command("probe", self._folder)
        probe = json.loads(self._ssh.run(process, *command, seconds=self._cluster.contact_seconds))
        free_gib, needed_gib = probe["disk_bytes"] / 2**30, self._cluster.min_disk_gib
        if free_gib < needed_gib:
            message = f"{probe['home']} has {free_gib:.1f} GiB free, min_disk_gib = {needed_gib:g}"
            raise self._ssh.error(process, f"{message}: make room there, or lower it", is_users=True)
        if not started - CLOCK_SECONDS < probe["time"] < time.time() + CLOCK_SECONDS:
            message = f"its clock is {probe['time'] - started:+.0f} s off this machine's: Google's services would refuse"
            raise self._ssh.error(process, f"{message} one of them; set the wrong one", is_users=True)
        return dict(probe)

    def _copy(self, probes: list[dict[str, Any]]) -> int:
        """Copy to each host the files that it is missing; the number of bytes sent to all of them."""
        packed = self._run.code()
        if not packed:
            file = f"{self._run.location}/code.tar.gz"
            raise UserError(f"{file}, from which hosts get the code, is missing: `launch` the run anew")
        code = shipping.CodeArchive(packed)
        deltas: dict[str, bytes | None] = {}
        tars = {}
        for process, probe in enumerate(probes):
            # Made once for all hosts that are missing the same files, as most are.
            digests = json.dumps(probe["files"], sort_keys=True)
            if digests not in deltas:
                deltas[digests] = code.delta(probe["files"])
            if tar := deltas[digests]:
                tars[process] = tar
        num_bytes = sum(map(len, tars.values()))
        self._attempt.report_phase(
            f"copying the code to {len(tars)} hosts, {num_bytes / 2**20:.1f} MiB in all"
        )

        def copy(process: int) -> None:
            self._attempt.check_stopped()
            self._ssh.run(process, *bootstrap_command("receive", self._folder), text=tars[process])

        self._ssh.each(copy, [*tars])
        return num_bytes

    def _python(self, process: int, folder: str) -> str:
        """The Python of a host: the cluster's, or one that the lock file describes."""
        self._attempt.check_stopped()
        if self._cluster.python:
            return self._cluster.python
        self._attempt.report_phase("making the environment of the hosts from the lock file")
        environments = f"{Path(folder).parent}/environments"
        script = f"{folder}/code/{shipping.SETUP}"
        # With the cluster's variables, such as PIP_INDEX_URL of a mirror.
        variables = [f"{key}={value}" for key, value in self._cluster.environment.items()]
        command = ["env", *variables, "sh", script, environments, self._cluster.interpreter or ""]
        output = self._ssh.run(process, *command, num_lines=SETUP_LINES)
        return output.decode().strip().splitlines()[-1]

    def _preflight(self, folders: list[str], pythons: list[str]) -> tuple[str, str]:
        """The address at which the processes are to meet, and a host's eviction notice. Raises HostError."""
        address = self._machines[0].internal
        request = {"plan": dataclasses.asdict(self._plan), "address": address}

        def check(process: int) -> dict[str, Any]:
            self._attempt.check_stopped()
            text = json.dumps({**request, "process": process, "ports": first["ports"]}) + "\n"
            command = self._preflight_command(folders[process], pythons[process])
            report = json.loads(self._ssh.run(process, *command, text=text.encode()))
            return self._checked(process, report, first)

        with self._listening(self._preflight_command(folders[0], pythons[0]), request) as first:
            others = self._ssh.each(check, range(1, self._plan.processes))
        for port in first["ports"]:
            if all(port in report["ports"] for report in others):
                # One notice is enough. `max` finds it, since the hosts without one report an empty text.
                return f"{address}:{port}", max(report["notice"] for report in (first, *others))
        # The first port is the free one, which every host reaches where no firewall is in the way.
        unreached = [
            p for p, report in enumerate(others, start=1) if first["ports"][0] not in report["ports"]
        ]
        ports, network = ", ".join(map(str, first["ports"])), self._cluster.network or "default"
        message = (
            f"it cannot reach host 0 at {address}, TCP ports {ports}: let the firewall of network {network}"
        )
        raise self._ssh.error(unreached[0], f"{message} pass TCP between the VMs", is_users=True)

    def _preflight_command(self, folder: str, python: str) -> list[str]:
        return remote_program(self._cluster, folder, python, "preflight", folder)

    @contextlib.contextmanager
    def _listening(self, command: list[str], request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The report of host 0, which listens at its ports meanwhile."""
        process = self._ssh.open(0, *command)
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            process.stdin.write((json.dumps({**request, "process": 0}) + "\n").encode())
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                raise self._ssh.error(
                    0, "".join(last_lines(process.stderr.read())) or "preflight ends without a report"
                )
            report = json.loads(line)
            yield self._checked(0, report, report)
        finally:
            with contextlib.suppress(OSError):  # the connection may have ended before its input was sent
                process.stdin.close()
            process.wait()

    def _checked(self, process: int, report: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
        """The report of a host. Raises HostError with its problems, and where it differs from host 0."""
        problems = list(report["problems"])
        if report["fingerprint"] != first["fingerprint"]:
            both = f"{report['fingerprint']}, {first['fingerprint']}"
            problems.append(f"its code or packages differ from those of host 0: {both}")
        if problems:
            raise self._ssh.error(process, "; ".join(problems), is_users=True)
        return report

    def _start_agent(self, process: int, folder: str, python: str, coordinator: str) -> None:
        self._attempt.check_stopped()
        spec = WorkerSpec(
            dataclasses.asdict(self._plan),
            self._attempt.number,
            process,
            coordinator,
            environment=host_environment(self._cluster, folder) | slice_environment(self._machines, process),
            secrets={name: os.environ[name] for name in self._cluster.secrets},
        )
        command = remote_program(self._cluster, folder, python, "agent", "start", folder)
        self._ssh.run(process, *command, text=json.dumps(dataclasses.asdict(spec)).encode())


def slice_environment(machines: list[Machine], process: int) -> dict[str, str]:
    """The variables by which the worker on `machines[process]` finds the other slices; none where there is one."""
    coordinator = f"{machines[0].internal}:{MEGASCALE_PORT}"
    return megascale_environment(coordinator, machines[-1].slice + 1, machines[process].slice)


def bootstrap_command(command: str, folder: str) -> tuple[str, ...]:
    # The host has no file of ours yet, so the program itself is an argument.
    program = Path(bootstrap.__file__).read_text()
    return ("python3", "-I", "-c", program, command, folder)
