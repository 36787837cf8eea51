"""On a TPU VM, before anything runs: what would fail later, in words.

`python -m podlaunch.host preflight FOLDER` reads Questions on standard input. It answers with a line of JSON; on
host 0 it first listens until its standard input ends, so that the other hosts can try to reach it.
"""

import contextlib
import json
import os
import socket
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import UserError
from launcher import accelerators, metadata
from launcher.agent import end_previous
from launcher.plan import Plan
from launcher.provenance import here
from launcher.rundir import RunDirectory

LOCK_FILE = Path("/tmp/libtpu_lockfile")  # noqa: S108 (libtpu's choice)
# jax's own, where firewalls let nothing else through (https://github.com/jax-ml/jax/issues/35905).
KNOWN_PORTS = (8476, 8482)
CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class Questions:
    plan: dict[str, Any]
    process: int
    address: str
    """Of host 0, at which the processes are to meet."""
    ports: list[int] = field(default_factory=list)
    """At which host 0 listens; none: this is host 0."""


@dataclass(frozen=True)
class Answers:
    problems: list[str]
    """What the user must mend on this host."""
    time: float
    here: dict[str, Any]
    """Code and packages, which must be the same everywhere."""
    ports: list[int]
    """At which host 0 listens, or is reached."""
    notice: str = ""
    """That the host is about to be taken away."""


def answers(folder: Path, questions: Questions) -> Answers:
    plan = Plan.from_json(json.dumps(questions.plan))
    end_previous(folder)
    problems = [*_chip_problems(plan), *_path_problems(plan), *_bucket_problems(plan, questions.process)]
    ports = [port for port in questions.ports if _reaches(questions.address, port)]
    return Answers(problems, time.time(), here(), ports, metadata.notice() or "")


def _chip_problems(plan: Plan, dev: Path = Path("/dev")) -> list[str]:
    """Chips that are not there, or that another process has."""
    if plan.platform != "tpu":
        return []
    chips = accelerators.tpu_chips(dev)
    assert plan.submission is not None
    expected = accelerators.tpu(plan.submission["accelerator"])[0].chips_per_vm
    if len(chips) != expected:
        return [
            f"{len(chips)} TPU chips are visible, the plan has {expected}: delete this TPU, and create another"
        ]
    if found := holders(chips):
        return [f"its TPU chips are in use by {', '.join(found)}: end that, or use another TPU"]
    with contextlib.suppress(OSError):  # left by what was killed
        LOCK_FILE.unlink(missing_ok=True)
    return []


def holders(files: list[Path]) -> list[str]:
    """Processes that have one of the files open."""
    found = []
    wanted = {str(file) for file in files}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if any(os.path.realpath(fd) in wanted for fd in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found.append(f"process {process.name} ({command.strip()[:80]})")
    return found


def _path_problems(plan: Plan) -> list[str]:
    data = plan.config["data"]
    paths = {f"data.{split}.path": (data.get(split) or {}).get("path") for split in ("train", "eval")}
    return [
        f"{key} = {path} is not there: put the data under gs://, or on each VM"
        for key, path in paths.items()
        if path and "://" not in path and not Path(path).exists()
    ]


def _bucket_problems(plan: Plan, process: int) -> list[str]:
    """A host writes there with the permissions of its own service account."""
    try:
        run = RunDirectory(plan.run_directory)
        run.report(process)  # a write would wait long for what is out of reach
        run.write_report(process, {"phase": "checked", "time": time.time()})
    except UserError as e:
        return [str(e)]
    return []


def listen(address: str) -> list[socket.socket]:
    """A free port, and the known ones that are free."""
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
    questions = Questions(**json.loads(sys.stdin.readline()))
    found = answers(folder, questions)
    listening = [] if questions.process else listen(questions.address)
    ports = [s.getsockname()[1] for s in listening] or found.ports
    if not (questions.process or listening):
        found.problems.append(f"it cannot listen at {questions.address}: no network interface here has it")
    print(json.dumps({**found.__dict__, "ports": ports}), flush=True)
    if listening:
        sys.stdin.read()


if __name__ == "__main__":
    main()
