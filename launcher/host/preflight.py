"""The checks on a TPU VM before anything runs there: whatever would fail later is found now, in words.

`python -m podlaunch.host preflight FOLDER` reads a PreflightRequest on standard input and answers with a
PreflightReport as a line of JSON. On host 0 it then listens until its standard input ends, so that the other hosts
can try to reach it.
"""

import contextlib
import json
import socket
import sys
import time
from dataclasses import dataclass, field
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
# jax's own ports, for firewalls that let nothing else through (https://github.com/jax-ml/jax/issues/35905).
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
    time: float
    fingerprint: dict[str, Any]
    """Code and packages, which must be the same on all hosts."""
    ports: list[int]
    """Ports at which host 0 listens, or at which this host reaches it."""
    notice: str = ""
    """Announcement that the host is about to be taken away; empty where there is none."""


def run_checks(folder: Path, request: PreflightRequest) -> PreflightReport:
    """End what an earlier attempt has left in `folder`, and check this host."""
    plan = Plan.from_json(json.dumps(request.plan))
    end_previous(folder)
    problems = [*_chip_problems(plan), *_path_problems(plan), *_bucket_problems(plan, request.process)]
    ports = [port for port in request.ports if _reaches(request.address, port)]
    return PreflightReport(problems, time.time(), fingerprint(), ports, metadata.eviction_notice() or "")


def _chip_problems(plan: Plan, dev: Path = Path("/dev")) -> list[str]:
    """Chips that are missing, or in use by another process."""
    if plan.platform != "tpu":
        return []
    chips = tpu_chips(dev)
    assert plan.submission is not None
    expected = parse_tpu(plan.submission["accelerator"])[0].chips_per_vm
    if len(chips) != expected:
        return [
            f"{len(chips)} TPU chips are visible, the plan has {expected}: delete this TPU, and create another"
        ]
    if found := processes_using(chips):
        return [f"its TPU chips are in use by {', '.join(found)}: end that, or use another TPU"]
    with contextlib.suppress(OSError):  # a killed process leaves the file behind
        LOCK_FILE.unlink(missing_ok=True)
    return []


def _path_problems(plan: Plan) -> list[str]:
    data = plan.config["data"]
    paths = {f"data.{split}.path": (data.get(split) or {}).get("path") for split in ("train", "eval")}
    return [
        f"{key} = {path} is not there: put the data under gs://, or on each VM"
        for key, path in paths.items()
        if path and "://" not in path and not Path(path).exists()
    ]


def _bucket_problems(plan: Plan, process: int) -> list[str]:
    """Whether this host can write to the run directory, which it does as its own service account."""
    try:
        run = RunDirectory(plan.run_directory)
        run.hosts.report(process)  # first, since a write waits long for a bucket that is out of reach
        run.hosts.write_report(process, {"phase": "checked", "time": time.time()})
    except UserError as e:
        return [str(e)]
    return []


def listen(address: str) -> list[socket.socket]:
    """Sockets that listen at `address`: at a free port, and at those known ports that are free."""
    listening = []
    for port in (0, *KNOWN_PORTS):
        s = socket.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((address, port))
        except OSError:
            s.close()
            continue
        s.listen(1024)
        listening.append(s)
    return listening


def _reaches(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def main() -> None:
    folder = Path(sys.argv[1])
    request = PreflightRequest(**json.loads(sys.stdin.readline()))
    found = run_checks(folder, request)
    listening = [] if request.process else listen(request.address)
    ports = [s.getsockname()[1] for s in listening] or found.ports
    if not (request.process or listening):
        found.problems.append(f"it cannot listen at {request.address}: no network interface here has it")
    print(json.dumps({**found.__dict__, "ports": ports}), flush=True)
    if listening:
        sys.stdin.read()


if __name__ == "__main__":
    main()
