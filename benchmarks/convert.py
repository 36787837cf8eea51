"""Images a second that conversion takes from a folder of JPEGs to shards, on one process.

Ours reads, writes, reads back and checksums. LitData's and MosaicML's writers do the same work in their own
formats where they are installed (`pip install litdata mosaicml-streaming`); they do not read back. Each
writes the same files, once to fill the page cache and then `--repeats` times; the median counts.
"""

import argparse
import importlib.util
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks._images import photographs
from trainer.data.tools.convert import Settings, convert

NUM_CLASSES = 10
SHARD_BYTES = 128 << 20


def write_folder(folder: Path, num_images: int) -> None:
    distinct = photographs(min(num_images, 200))
    for i in range(num_images):
        file = folder / f"class{i % NUM_CLASSES}" / f"{i:06}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(distinct[i % len(distinct)])


def ours(source: Path, destination: Path) -> None:
    quiet = lambda *_: lambda *_: None  # noqa: E731
    convert(str(source), str(destination), Settings("imagefolder"), jobs=1, begin=quiet)


def ours_resized(source: Path, destination: Path) -> None:
    quiet = lambda *_: lambda *_: None  # noqa: E731
    convert(str(source), str(destination), Settings("imagefolder", resize=256), jobs=1, begin=quiet)


def sample(file: str) -> dict[str, object]:
    path = Path(file)
    return {"image": path.read_bytes(), "label": int(path.parent.name.removeprefix("class"))}


def litdata(source: Path, destination: Path) -> None:
    from litdata import optimize

    files = sorted(map(str, source.glob("*/*")))
    optimize(
        fn=sample,
        inputs=files,
        output_dir=str(destination),
        num_workers=1,
        chunk_bytes=SHARD_BYTES,
        verbose=False,
    )


def mosaicml(source: Path, destination: Path) -> None:
    from streaming import MDSWriter

    columns = {"image": "bytes", "label": "int"}
    with MDSWriter(out=str(destination), columns=columns, size_limit=SHARD_BYTES) as writer:
        for file in sorted(map(str, source.glob("*/*"))):
            writer.write(sample(file))


def seconds(write: Callable[[Path, Path], None], source: Path, destination: Path) -> tuple[float, float]:
    """Wall and processor seconds of one conversion, children included."""
    shutil.rmtree(destination, ignore_errors=True)
    cpu, begun = sum(os.times()[:4]), time.perf_counter()
    write(source, destination)
    return time.perf_counter() - begun, sum(os.times()[:4]) - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    writers: dict[str, Callable[[Path, Path], None]] = {
        "podlaunch": ours,
        "podlaunch, resize 256": ours_resized,
    }
    if importlib.util.find_spec("litdata"):
        writers["litdata"] = litdata
    if importlib.util.find_spec("streaming"):
        writers["mosaicml-streaming"] = mosaicml
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "images")
        write_folder(source, arguments.images)
        print(f"{'writer':<24}{'images/s':>10}{'images/CPU s':>14}")
        for name, write in writers.items():
            runs = [seconds(write, source, Path(folder, "out")) for _ in range(arguments.repeats + 1)][1:]
            wall, cpu = (arguments.images / statistics.median(column) for column in zip(*runs, strict=True))
            print(f"{name:<24}{wall:>10,.0f}{cpu:>14,.0f}")


if __name__ == "__main__":
    main()
