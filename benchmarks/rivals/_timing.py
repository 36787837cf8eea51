"""How every side is timed: a pass to warm up, then one that counts. Standard library only, for all environments."""

import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SIZE = 224
BATCH = 64
SHARD_BYTES = 128 << 20

Pass = Callable[[], int]
"""Does a side's work, and returns the number of images that it did it to."""
Write = Callable[[Path, Path], None]
"""Writes the images of a folder as shards to another."""


def run(**sides: Callable[[Path, int], Pass]) -> None:
    """The side, the folder and the number of cores are this process's arguments; prints one line of JSON."""
    side, folder, cores = sys.argv[1:]
    work = sides[side](Path(folder), int(cores))
    work()
    report(*took(work))


def run_conversion(write: Write) -> None:
    """What each further image takes: the start of processes is in a small conversion as in a large one."""
    folder = Path(sys.argv[2])

    def work(name: str) -> Pass:
        shutil.rmtree(folder / "converted", ignore_errors=True)
        return lambda: write(folder / name, folder / "converted") or len(files(folder / name))

    took(work("few"))
    few, many = took(work("few")), took(work("many"))
    report(*(b - a for a, b in zip(few, many, strict=True)))


def took(work: Pass) -> tuple[int, float, float]:
    """Images, seconds, and seconds of CPU."""
    begun, cpu = time.perf_counter(), cpu_seconds()
    images = work()
    return images, time.perf_counter() - begun, cpu_seconds() - cpu


def report(images: int, seconds: float, cpu: float) -> None:
    print(json.dumps({"images_per_second": images / seconds, "cpu_ms": 1000 * cpu / images}), flush=True)


def cpu_seconds() -> float:
    """Of this process and its workers, those that live and those that have ended."""
    ticks = 0
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return sum(os.times()[:4]) + ticks / os.sysconf("SC_CLK_TCK")


def files(folder: Path) -> list[Path]:
    """The JPEGs of an image folder."""
    return sorted(folder.glob("*/*.jpg"))


def jpegs(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in files(folder / "images")]


def sample(file: Path) -> dict[str, bytes | int]:
    return {"image": file.read_bytes(), "label": int(file.parent.name)}


def batches(stream: Iterator[object], images: int) -> Pass:
    """Take `images` from an endless stream of batches."""

    def work() -> int:
        for _ in range(images // BATCH):
            next(stream)
        return images // BATCH * BATCH

    return work
