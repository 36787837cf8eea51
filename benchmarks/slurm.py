"""SLURM on four nodes of this machine: start, recovery from a killed task, and load on the controller.

The cluster is that of the tests, so this needs root and SLURM. Start: from srun to the end of the first
step, split. Recovery: from SIGKILL of a task to the first step of the next attempt, beside the same
training started by plain `srun` with jax's defaults, in a loop until it succeeds. Load: calls that the
controller counts in a minute in which a job runs, with `launch` following it and without.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks._common import REPOSITORY, print_table
from launcher.rundir import RunDirectory

QUICKSTART = str(REPOSITORY / "configs" / "quickstart.yaml")
PLAIN = str(REPOSITORY / "benchmarks" / "rivals" / "plain_srun.py")
UNDER_WAY = 5
"""Step from which on a task may be killed."""
PHASES = {
    "srun, host, meeting": "hosts",
    "import jax, flax, …": "import",
    "join": "join",
    "open data": "open_data",
    "initialise": "initialise",
    "compile": "compile",
    "first batch": "first_batch",
    "first step": "first_step",
}


def wait_for(what: Callable[[], object], seconds: float = 300) -> float:
    """When it came true."""
    deadline = time.time() + seconds
    while not what():
        if time.time() > deadline:
            raise SystemExit(f"not within {seconds:.0f} s; is the machine very busy?")
        time.sleep(0.02)
    return time.time()


def launch(
    environment: dict[str, str], root: str, name: str, *more: str
) -> tuple[subprocess.Popen, RunDirectory]:
    command = [sys.executable, "-m", "podlaunch", QUICKSTART, "--root", root, "--name", name, *more]
    process = subprocess.Popen(
        [*command, "--cluster", "slurm-4x0"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return process, RunDirectory(Path(root, name))


def trains(run: RunDirectory, attempt: int) -> bool:
    report = run.hosts.report(0)
    return run.attempts.last() == attempt and report.get("phase") == "training"


def start(environment: dict[str, str], root: str, name: str) -> list[dict[str, float]]:
    """The split of each process, from srun to the end of its first step."""
    typed = time.time()
    process, run = launch(environment, root, name, "train.steps=2", "schedule.warmup_epochs=0")
    began = wait_for(lambda: (run.path / "logs" / "attempt-1" / "srun.log").exists())
    if process.wait():
        raise SystemExit(f"launch ended with exit code {process.returncode}")
    splits = []
    for number in range(4):
        report = run.hosts.report(number)
        seconds = report["seconds"] | {"hosts": report["begun"] - began}
        split = {label: seconds.get(key, 0.0) for label, key in PHASES.items()}
        splits.append({"launch to srun": began - typed, **split, "srun to first step": sum(split.values())})
    return splits


def ours(environment: dict[str, str], root: str) -> tuple[float, float]:
    """Seconds from a task's death to the end of the step, and to the first step of the next attempt."""
    process, run = launch(environment, root, "killed", "train.steps=1000")
    wait_for(lambda: trains(run, 1) and run.hosts.report(0)["step"] >= UNDER_WAY)
    victims = [run.hosts.report(number)["pid"] for number in range(4)]
    os.kill(victims[3], signal.SIGKILL)
    killed = time.time()
    over = wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in victims))
    again = wait_for(lambda: trains(run, 2))
    subprocess.run(
        [sys.executable, "-m", "podlaunch", "stop", "killed", "--root", root], env=environment, check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    process.wait()
    return over - killed, again - killed


def plain(environment: dict[str, str], root: str) -> tuple[float, float]:
    """The same, of a batch script that runs `srun python train.py` until it succeeds."""
    steps = Path(root, "steps")
    steps.mkdir()
    script = f'until srun {sys.executable} {PLAIN} {QUICKSTART} "{root}"; do :; done'
    job = subprocess.run(
        ["sbatch", "--parsable", "--nodes=4", "--ntasks-per-node=1", "--output=/dev/null", "--wrap", script],
        env=environment | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(REPOSITORY)},
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip

    def told() -> list[list[str]]:
        """`process pid` of each that is under way, by the name of its file."""
        files = sorted(steps.iterdir())
        return [path.name.split("-") for path in files if int(path.read_text() or 0) >= UNDER_WAY]

    wait_for(lambda: len(told()) == 4)
    victims = [int(pid) for _, pid in told()]
    os.kill(victims[3], signal.SIGKILL)
    killed = time.time()
    over = wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in victims))
    again = wait_for(lambda: len(list(steps.iterdir())) >= 5)
    subprocess.run(["scancel", job], env=environment, check=True)
    return over - killed, again - killed


def calls(environment: dict[str, str]) -> int:
    """Calls that the controller has answered, but for the nodes' own and for this question."""
    text = subprocess.run(["sdiag"], env=environment, check=True, capture_output=True, text=True).stdout
    by_type = re.findall(r"^\t(\w+) +\(\s*\d+\) count:(\d+)", text, re.MULTILINE)
    return sum(int(n) for name, n in by_type if name.startswith("REQUEST_") and "STATS" not in name)


def load(environment: dict[str, str], root: str, seconds: float) -> dict[str, float]:
    """Calls a minute while a job trains."""
    process, run = launch(environment, root, "followed", "train.steps=100000")
    wait_for(lambda: trains(run, 1))
    found = {}
    for what in ("launch following", "nobody following"):
        if what.startswith("nobody"):
            process.kill()
            process.wait()
        before = calls(environment)
        time.sleep(seconds)
        found[what] = (calls(environment) - before) * 60 / seconds
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120, help="how long the load is counted, each")
    parser.add_argument(
        "--without-plain", action="store_true", help="leave out plain srun, which takes minutes"
    )
    args = parser.parse_args()
    from tests.clusters import slurm

    if reason := slurm.missing():
        raise SystemExit(reason)
    with slurm.raised() as cluster, tempfile.TemporaryDirectory() as root:
        environment = os.environ | cluster.environment | {"XDG_CACHE_HOME": f"{root}/cache"}
        rounds = {name: start(environment, root, name) for name in ("cold", "warm")}
        columns = [f"{name} {number}" for name in rounds for number in range(4)]
        splits = [split for name in rounds for split in rounds[name]]
        print_table(
            ["seconds, by process", *columns],
            [[phase, *(f"{split[phase]:.2f}" for split in splits)] for phase in splits[0]],
        )
        killed = {"launch": ours(environment, root)}
        cluster.wait_until_idle()
        if not args.without_plain:
            killed["plain srun, jax's defaults"] = plain(environment, root)
            cluster.wait_until_idle()
        print()
        print_table(
            ["seconds from SIGKILL of a task", "step is over", "next first step"],
            [[who, *(f"{s:.1f}" for s in seconds)] for who, seconds in killed.items()],
        )
        print()
        print_table(
            ["calls to the controller a minute", "calls"],
            [[what, f"{n:.1f}"] for what, n in load(environment, root, args.seconds).items()],
        )
        cluster.run("scancel", "--user=root")
        cluster.wait_until_idle()


if __name__ == "__main__":
    main()
