"""Where the time goes from typing `launch` to the end of the first step, cold and warm.

Runs the quickstart for one step, twice in each round: with an empty cache folder, then with what the first
left there (the digits and the compiled programs). The split is what each process writes to the run
directory; one that has compiled early waits for the others, there or in its first step. Cold says nothing
about the disk: Python's packages are in the page cache both times.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._common import REPOSITORY, print_table
from launcher.rundir import RunDirectory

LAUNCH = str(Path(sys.executable).with_name("launch"))
ONE_STEP = ["train.steps=1", "schedule.warmup_epochs=0"]
HELP_TIMES = 5
PHASES = {
    "launcher: import, plan": ["launcher"],
    "worker: Python": ["python"],
    "import jax, flax, …": ["import"],
    "join": ["join"],
    "open data": ["open_data"],
    "initialise": ["restore", "initialise"],
    "compile": ["compile"],
    "first batch": ["first_batch"],
    "first step": ["first_step"],
}


def seconds_to_first_step(root: str, name: str, environment: dict[str, str]) -> list[dict[str, float]]:
    """The split of each process."""
    recipe = str(REPOSITORY / "configs" / "quickstart.yaml")
    run = RunDirectory(Path(root, name))
    typed = time.time()
    process = subprocess.Popen(
        [LAUNCH, recipe, *ONE_STEP, "--root", root, "--name", name],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    while "first_step" not in run.hosts.report(0).get("seconds", {}):
        if process.poll() is not None:
            raise SystemExit(f"launch ended with exit code {process.returncode} before its first step")
        time.sleep(0.01)
    total = time.time() - typed
    if process.wait():
        raise SystemExit(f"launch ended with exit code {process.returncode}")
    planned = (run.path / "plan.json").stat().st_mtime
    splits = []
    for report in map(run.report, range(run.hosts.report(0)["processes"])):
        seconds = report["seconds"] | {"launcher": planned - typed, "python": report["begun"] - planned}
        phases = {label: sum(seconds.get(part, 0.0) for part in parts) for label, parts in PHASES.items()}
        splits.append(phases | {"rest": total - sum(phases.values()), "typing to first step": total})
    return splits


def help_seconds() -> float:
    begun = time.perf_counter()
    subprocess.run([LAUNCH, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    rounds = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            environment["XDG_CACHE_HOME"] = f"{folder}/cache"
            splits = {name: seconds_to_first_step(folder, name, environment) for name in ("cold", "warm")}
            rounds.append({f"{name} {i}": split for name in splits for i, split in enumerate(splits[name])})
    columns = list(rounds[0])
    table = [
        [phase, *(f"{statistics.median(r[column][phase] for r in rounds):.2f}" for column in columns)]
        for phase in rounds[0][columns[0]]
    ]
    print_table(["seconds, by process", *columns], table)
    helped = statistics.median(help_seconds() for _ in range(HELP_TIMES))
    print(f"launch --help, median of {HELP_TIMES}: {helped:.2f} s (bar: 0.5 s)")


if __name__ == "__main__":
    main()
