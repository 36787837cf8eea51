"""The quickstart as a newcomer has it: accuracy, seconds of training, seconds in all.

Training is the whole life of the worker processes: import, join, data, compilation, steps, evaluations,
saves. With --clone the clock starts at `git clone` of this repository's last commit into an empty folder,
and runs on through `make quickstart`, which installs everything; caches are empty, so all packages are
downloaded. Bars: 97 %, 90 s of training, and 5 minutes from the clone on 2 cores.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks._common import REPOSITORY, print_table
from launcher.rundir import RunDirectory


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clone", action="store_true", help="from a fresh clone, installation included")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"XDG_CACHE_HOME": f"{folder}/cache"}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        begun = time.perf_counter()
        if args.clone:
            home = Path(folder, "podlaunch")
            subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(home)], check=True)
            command = ["make", "quickstart"]
        else:
            home = Path(folder)
            command = [
                str(Path(sys.executable).with_name("launch")),
                str(REPOSITORY / "configs" / "quickstart.yaml"),
            ]
        subprocess.run(command, cwd=home, env=environment, check=True)
        wall = time.perf_counter() - begun
        run = RunDirectory(home / "runs" / "quickstart")
        result, training = run.result(), sum(a["wall_seconds"] for a in run.attempts.all())
    assert result is not None
    accuracy, count = result["metrics"]["eval/accuracy"], result["metrics"]["eval/count"]
    print()
    print_table(
        ["figure", "measured", "bar"],
        [
            [f"accuracy on {count} held-out digits", f"{accuracy:.2%}", "97 %"],
            ["training, seconds", f"{training:.0f}", "90"],
            [
                "clone, install and run, seconds" if args.clone else "launch, seconds",
                f"{wall:.0f}",
                "300" if args.clone else "",
            ],
        ],
    )


if __name__ == "__main__":
    main()
