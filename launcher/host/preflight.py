"""The checks on a TPU VM before anything runs there, so that what would fail later is explained now.

`python -m podlaunch.host preflight FOLDER` reads a PreflightRequest on standard input and answers with a
PreflightReport as a line of JSON. On host 0 it then listens until its standard input ends, so that the other hosts
can try to reach it.
"""

import contextlib
import json
import pwd
import socket
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import UserError
from launcher.accelerators import parse_tpu
from launcher.host.agent import end_previous
from launcher.machine import metadata
from launcher.machine.devices import processes_using, tpu_chips
from launcher.machine.provenance import fingerprint
from launcher.plan import Plan
from launcher.rundir import RunDirectory

LOCK_FILE = Path("/tmp/libtpu_lockfile")  # noqa: S108 (libtpu's choice)
# jax's own ports, old and new: Google's firewall rules let 8476 through, and not always 8482
# (https://github.com/jax-ml/jax/issues/35905).
KNOWN_PORTS = (8476, 8482)
CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class PreflightRequest:
    plan: dict[str, Any]
    process: int
    address: str
    """Address of host 0, at which the processes are to meet."""
    ports: list[int] = field(default_factory=list)
    """Ports at which host 0 listens; empty on host 0 itself."""


@dataclass(frozen=True)
class PreflightReport:
    problems: list[str]
    """What the user must mend on this host."""
    fingerprint: dict[str, Any]
    """Code and packages, which must be the same on all hosts."""
    ports: list[int]
    """Ports at which host 0 listens, or at which this host reaches it."""
    notice: str = ""
    """Announcement that the host is about to be taken away; empty where there is none."""


def run_checks(folder: Path, request: PreflightRequest) -> PreflightReport:
    """End what an earlier attempt has left in `folder`, and check this host."""
    plan = Plan(**request.plan)
    end_previous(folder)
    problems = [*_chip_problems(plan), *_path_problems(plan), *_bucket_problems(plan, request.process)]
    ports = [port for port in request.ports if _reaches(request.address, port)]
    return PreflightReport(problems, fingerprint(), ports, metadata.eviction_notice() or "")


def _chip_problems(plan: Plan, dev: Path = Path("/dev")) -> list[str]:
    """Chips that are missing, or in use by another process."""
    if plan.platform != "tpu":
        return []
    chips = tpu_chips(dev)
    assert plan.submission is not None
    expected = parse_tpu(plan.submission["accelerator"])[0].chips_per_vm
    if len(chips) != expected:
        problem = f"{len(chips)} TPU chips are visible, the plan has {expected}"
        return [f"{problem}: delete this TPU, and create another"]
    if users := processes_using(chips):
        return [f"its TPU chips are in use by {', '.join(users)}: stop these processes, or use another TPU"]
    return _lock_problems()


def _lock_problems() -> list[str]:
    """Remove libtpu's lock file: a killed process leaves it behind (https://github.com/jax-ml/jax/issues/10192)."""
    try:
        LOCK_FILE.unlink(missing_ok=True)
    except OSError:
        # Nobody but its owner and root may remove a file in /tmp, and libtpu refuses to start beside it.
        uid = LOCK_FILE.stat().st_uid
        with contextlib.suppress(KeyError):
            return [_foreign_lock(f"user {pwd.getpwuid(uid).pw_name}")]
        return [_foreign_lock(f"user number {uid}")]
    return []


def _foreign_lock(owner: str) -> str:
    return f"{LOCK_FILE} is left from a process of {owner}, and TPUs cannot be used beside it: `sudo rm {LOCK_FILE}`"


def _path_problems(plan: Plan) -> list[str]:
    data = plan.config["data"]
    if data["source"] != "records":
        return []
    paths = {f"data.{split}.path": (data.get(split) or {}).get("path") for split in ("train", "eval")}
    return [
        f"{key} = {path} does not exist: put the data under gs://, or copy it to each VM"
        for key, path in paths.items()
        if path and "://" not in path and not Path(path).exists()
    ]


def _bucket_problems(plan: Plan, process: int) -> list[str]:
    """Whether this host can write to the run directory, which it does as its own service account."""
    try:
        run = RunDirectory(plan.run_directory)
        run.hosts.report(process)  # first, since a write is retried for ten minutes where no bucket answers
        run.hosts.write_report(process, {"phase": "checked", "time": time.time()})
    except UserError as e:
        return [str(e)]
    return []


def listen(address: str) -> list[socket.socket]:
    """Sockets that listen at `address`: at a free port, and at those known ports that are free."""
    listening = []
    # The free port comes first, and the launcher takes the first that all hosts reach: a port that changes with each
    # attempt meets no process that an earlier attempt has left.
    for port in (0, *KNOWN_PORTS):
        with contextlib.suppress(OSError):  # another process has the port
            listening.append(socket.create_server((address, port), backlog=1024))
    return listening


def _reaches(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def main() -> None:
    request = PreflightRequest(**json.loads(sys.stdin.readline()))
    report = run_checks(Path(sys.argv[1]), request)
    listening = [] if request.process else listen(request.address)
    report.ports.extend(s.getsockname()[1] for s in listening)
    if not (request.process or listening):
        report.problems.append(f"it cannot listen at {request.address}: no network interface here has it")
    print(json.dumps(asdict(report)), flush=True)
    if listening:
        sys.stdin.read()
