"""Ours beside the bare decoder, tf.data, torchvision, MosaicML Streaming, WebDataset and LitData, in one run.

The same JPEGs for all, each side in a process of its own that is held to as many cores as it may use, each
in the environment of benchmarks/environments, made on the first run. Sides take turns; medians of the rounds.
Decoding is from memory to 224×224; streams read local shards, with the same decoding, to batches of 64;
conversion writes the files' bytes unchanged, and its figure is that of a further image, without the start of
processes. An environment that cannot be had is left out, and said so. Linux only.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks._common import REPOSITORY, print_table
from benchmarks._images import photographs
from configs.files import cache_folder

BENCHMARKS = Path(__file__).parent
NUM_CLASSES = 10
COPIES = 8
"""Of each image, for conversion: enough to be slow beside the start of a process."""


@dataclass(frozen=True)
class Side:
    name: str
    script: str
    side: str
    environment: str | None = None
    """None: the one that runs this."""


BARE = Side("simplejpeg's own loop", "ours", "bare")
OURS = Side("ours", "ours", "decode")
ANTIALIASED = Side("ours, antialiased", "ours", "antialiased")
TF_DATA = Side("tf.data, fused decode and crop", "tf_data", "decode", "tensorflow")
TORCHVISION = Side("torchvision, PIL", "torchvision_pil", "decode", "torchvision")
OUR_STREAM = Side("ours", "ours", "stream")
MOSAIC = Side("MosaicML Streaming", "mosaicml_streaming", "stream", "mosaicml-streaming")
WEBDATASET = Side("WebDataset", "webdataset_tar", "stream", "webdataset")
OUR_WRITER = Side("ours, read back and checked", "ours", "convert")
MOSAIC_WRITER = Side("MosaicML MDSWriter", "mosaicml_streaming", "convert", "mosaicml-streaming")
IMAGE_FOLDER = Side("torchvision ImageFolder, its decoding", "torchvision_pil", "stream", "torchvision")
LITDATA = Side("LitData optimize", "litdata_optimize", "convert", "litdata")

GROUPS = {
    "decode and crop": (BARE, OURS, ANTIALIASED, TF_DATA, TORCHVISION),
    "local stream": (OUR_STREAM, MOSAIC, WEBDATASET, IMAGE_FOLDER),
    "conversion": (OUR_WRITER, MOSAIC_WRITER, LITDATA),
}
RATIOS: tuple[tuple[Side, Side, str], ...] = (
    (OURS, BARE, "at least 0.95"),
    (OURS, TF_DATA, "at least 1.1"),
    (OURS, TORCHVISION, "at least 3.5"),
    (ANTIALIASED, TORCHVISION, "no bar"),
    (OUR_STREAM, MOSAIC, "no bar"),
    (OUR_STREAM, WEBDATASET, "no bar"),
    (OUR_STREAM, IMAGE_FOLDER, "no bar"),
    (OUR_WRITER, MOSAIC_WRITER, "no bar"),
    (OUR_WRITER, LITDATA, "no bar"),
)
Runs = list[dict[str, float]]


def write_images(folder: Path, num_images: int) -> None:
    """images/, of it few/, and many/ with each COPIES times; as links."""
    for i, jpeg in enumerate(photographs(num_images)):
        file = folder / "images" / str(i % NUM_CLASSES) / f"{i:06}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg)
        copies = [Path("many", file.parent.name, f"{k}-{file.name}") for k in range(COPIES)]
        for copy in [*copies, *([Path("few", file.parent.name, file.name)] if i < num_images // 16 else [])]:
            (folder / copy).parent.mkdir(parents=True, exist_ok=True)
            os.link(file, folder / copy)


def python_of(environment: str | None, folder: Path, limit_seconds: float | None = None) -> str | None:
    """The interpreter of an environment, which is made unless it is there; None if that fails, or takes too long."""
    if environment is None:
        return sys.executable
    requirements = BENCHMARKS / "environments" / f"{environment}.txt"
    place, made = folder / environment, folder / environment / "made-of.txt"
    python = str(place / "bin" / "python")
    if not made.is_file() or made.read_text() != requirements.read_text():
        print(f"{environment}: installing into {place}", flush=True)
        venv.create(place, with_pip=True, clear=True, symlinks=True)
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"]
        try:
            done = subprocess.run(
                [*command, str(requirements)], capture_output=True, text=True, timeout=limit_seconds
            )
        except subprocess.TimeoutExpired:
            print(f"{environment}: left out, not installed within {limit_seconds:.0f} s")
            return None
        if done.returncode:
            print(f"{environment}: left out, {last_line(done.stderr)}")
            return None
        made.write_text(requirements.read_text())
    return python


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "nothing was said")


def measure(side: Side, python: str, folder: Path, cores: int) -> dict[str, float] | None:
    command = [python, str(BENCHMARKS / "rivals" / f"{side.script}.py"), side.side, str(folder), str(cores)]
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    held_to = sorted(os.sched_getaffinity(0))[:cores]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | quiet | {"PYTHONPATH": str(REPOSITORY)},
        preexec_fn=lambda: os.sched_setaffinity(0, held_to),
    )
    if done.returncode:
        print(f"{side.name}, {cores} cores: left out, {last_line(done.stderr)}")
        return None
    figures: dict[str, float] = json.loads(last_line(done.stdout))
    return figures


def group(
    sides: Sequence[Side], pythons: dict[str | None, str], folder: Path, cores: int, rounds: int
) -> dict[Side, Runs]:
    """Runs of each side that did not fail, taken in turns."""
    runs: dict[Side, Runs] = {side: [] for side in sides if side.environment in pythons}
    for _, side in itertools.product(range(rounds), list(runs)):
        figures = measure(side, pythons[side.environment], folder, cores) if side in runs else None
        if figures is None:
            runs.pop(side, None)
        else:
            runs[side].append(figures)
    return runs


def report(name: str, runs: dict[Side, Runs], cores: int) -> None:
    def column(side: Side, key: str) -> list[float]:
        return [figures[key] for figures in runs[side]]

    rows = []
    for side in runs:
        rates, cpu = column(side, "images_per_second"), column(side, "cpu_ms")
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        rows.append([side.name, f"{statistics.median(rates):,.0f}", spread, f"{statistics.median(cpu):.2f}"])
    print()
    print_table(
        [f"{name}, {cores} core{'s' * (cores > 1)}", "images/s", "rounds", "CPU ms an image"],
        rows or [[""] * 4],
    )
    for a, b, bar in RATIOS:
        if a in runs and b in runs:
            rate, cpu = (
                statistics.median(x / y for x, y in zip(column(a, key), column(b, key), strict=True))
                for key in ("images_per_second", "cpu_ms")
            )
            figures = f"{rate:.2f} by images/s, {1 / cpu:.2f} by CPU"
            print(f"{a.name} ÷ {b.name}: {figures}; {bar}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    kept = cache_folder() / "rivals"
    about = "where the environments are kept, 25 GB (default: %(default)s)"
    parser.add_argument("--environments", type=Path, metavar="FOLDER", default=kept, help=about)
    arguments = parser.parse_args()
    names = sorted({side.environment or "" for sides in GROUPS.values() for side in sides})
    found = {name or None: python_of(name or None, arguments.environments) for name in names}
    pythons = {name: python for name, python in found.items() if python}
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), arguments.images)
        for name, sides in GROUPS.items():
            for cores in [1] if name == "conversion" else arguments.cores:
                report(name, group(sides, pythons, Path(folder), cores, arguments.rounds), cores)


if __name__ == "__main__":
    main()
