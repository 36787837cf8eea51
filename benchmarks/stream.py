"""The stream against the same images in a local folder: rate, bytes, memory, and how soon it begins.

A server of its own process, on a core of its own, speaks Cloud Storage's protocol and answers after --latency
seconds. Everything is read as training reads it, from `data.source: records` to decoded samples in threads,
without the network that is trained. Rounds alternate between folder and bucket.

    python -m benchmarks.stream
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks._common import REPOSITORY, print_table
from benchmarks._images import photographs
from configs.load import load
from configs.schema import RunConfig
from tests import gcs
from tests.trainer import datasets
from trainer.data.order import ProcessStream, WorkerSpec, train_order
from trainer.data.sources.records import open_splits
from trainer.data.storage.dataset import MANIFEST, RECORD_DTYPE, RECORDS, Shard, publish
from trainer.data.storage.store import open_store

DISTINCT = 256
BATCH = 256
THREADS = 8
SMALL_BYTES = 1000
PER_SHARD = 5000


def recipe(path: str, num_examples: int, *overrides: str) -> RunConfig:
    split = f"{{path: '{path}', num_examples: {num_examples}}}"
    given = [f"data.train={split}", f"data.eval={split}", f"train.batch_size={BATCH}", *overrides]
    return load(REPOSITORY / "configs" / "r50.yaml", given)


@contextmanager
def server(folder: Path, latency: float) -> Iterator[None]:
    """Cloud Storage with the files of `folder`, for this process and those it starts."""
    command = [sys.executable, "-m", "tests.gcs", "--latency", str(latency), "--folder", str(folder)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        os.environ |= gcs.environment(process.stdout.readline().strip())
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) > 1:  # a core of its own: elsewhere the server is not on the machine that trains
            os.sched_setaffinity(process.pid, cores[-1:])
            os.sched_setaffinity(0, cores[:-1])
        try:
            yield
        finally:
            process.terminate()


def read(config: RunConfig, *, position: int = 0, count: int) -> dict[str, float]:
    """Read and decode `count` samples from `position` on, in threads; what it took, and the reader's figures."""
    begun, cpu = time.perf_counter(), time.process_time()
    split, _ = open_splits(config)
    order = train_order(config, len(split), split.block_starts)
    stream = ProcessStream(order, position, position + count, BATCH, np.arange(BATCH))
    with closing(split.samples(stream, train=True)) as samples, ThreadPoolExecutor(THREADS) as pool:
        first = 0.0
        for _ in pool.map(samples.__getitem__, range(count)):
            first = first or time.perf_counter() - begun
        seconds = time.perf_counter() - begun
        figures = samples.metrics()
    return figures | {
        "first": first,
        "rate": (count - 1) / (seconds - first),
        "cpu_ms": 1000 * (time.process_time() - cpu) / count,
    }


def rates(folder: Path, rounds: int, count: int) -> None:
    n = len(json.loads((folder / "big" / MANIFEST).read_bytes())["shards"]) * DISTINCT
    places = {"folder": str(folder / "big"), "bucket": f"gs://{gcs.BUCKET}/big"}
    found: dict[str, list[dict[str, float]]] = {place: [] for place in places}
    for _ in range(rounds):
        for place, path in places.items():
            found[place].append(read(recipe(path, n), count=count))
    rows = []
    for place, runs in found.items():
        keys = (
            "rate",
            "cpu_ms",
            "data/fetched_per_used",
            "data/get_p50_ms",
            "data/get_p99_ms",
            "data/requests",
        )
        rows.append([place, *(f"{median(run[key] for run in runs):,.4g}" for key in keys)])
    print_table(["", "images/s", "CPU ms/image", "fetched ÷ used", "GET p50 ms", "p99 ms", "requests"], rows)
    ratios = [b["rate"] / a["rate"] for a, b in zip(found["folder"], found["bucket"], strict=True)]
    print(
        f"bucket ÷ folder, images/s: {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}); at least 0.9"
    )
    print(f"fetched ÷ used: {median(r['data/fetched_per_used'] for r in found['bucket']):.4f}; at most 1.02")


def child(path: str, num_examples: int, position: int, count: int, *overrides: str) -> dict[str, float]:
    """`read` in a process of its own: what it took, and its peak resident set in MiB."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.stream",
        "--child",
        path,
        *map(str, (num_examples, position, count)),
        *overrides,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def as_child(path: str, num_examples: str, position: str, count: str, *overrides: str) -> None:
    before = peak_mib()
    figures = read(recipe(path, int(num_examples), *overrides), position=int(position), count=int(count))
    print(json.dumps({"first": figures["first"], "before": before, "peak": peak_mib()}))


def peak_mib() -> float:
    # Not getrusage: its peak is handed down from the process that started this one.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def scale(num_photographs: int) -> None:
    """Start, resume and memory for 10⁴ and for 10⁶ records, and memory for photographs, at two budgets."""
    rows = []
    small = ("data.memory_mib=64", "data.image_size=32")
    photos = ("data.memory_mib=400", "data.window=32", "data.image_size=32")
    for name, n, settings in (
        ("small-10000", 10_000, small),
        ("small-1000000", 1_000_000, small),
        ("big", num_photographs, photos),
    ):
        path = f"gs://{gcs.BUCKET}/{name}"
        start = child(path, n, 0, BATCH, *settings)
        middle = child(path, n, n // 2 // BATCH * BATCH, BATCH, *settings)
        long = child(path, n, 0, min(n, 40 * BATCH) // BATCH * BATCH, *settings)
        mib = (f"{figure:.0f}" for figure in (long["before"], long["peak"], long["peak"] - long["before"]))
        budget = settings[0].partition("=")[2]
        rows.append([f"{n:,} records", f"{start['first']:.2f}", f"{middle['first']:.2f}", budget, *mib])
    print_table(["", "start s", "resume s", "budget MiB", "imports MiB", "peak MiB", "reading MiB"], rows)
    print("start and resume in the middle: at most 2 s each; reading: at most the budget and a constant")


def planning() -> None:
    """What the order costs for 10⁷ records, without reading any."""
    n = 10_000_000
    records = np.zeros(n, RECORD_DTYPE)
    begun = time.perf_counter()
    order = WorkerSpec(n, 0, "blocks", np.arange(0, n, 38), lanes=64, window=128)
    order.index(n // 2)
    ready = time.perf_counter() - begun
    begun = time.perf_counter()
    windows = 0
    for _, key in ProcessStream(order, 0, n // BATCH * BATCH, BATCH, np.arange(BATCH)).windows():
        order.records(key)
        windows += 1
    whole = time.perf_counter() - begun
    print(
        f"planning 10⁷ records: table {records.nbytes / 1e6:.0f} MB; first order {ready:.2f} s; the whole epoch "
        f"{whole:.1f} s in {windows:,} windows ({1e6 * whole / n:.2f} µs a record)"
    )


def write_big(folder: Path, num_images: int) -> None:
    """`num_images` photographs, of which DISTINCT differ, in shards of DISTINCT."""
    images = photographs(DISTINCT)
    print(f"{DISTINCT} photographs, {np.mean([len(i) for i in images]) / 1e3:.0f} KB in the mean")
    datasets.write(folder, images, [i % 1000 for i in range(DISTINCT)], num_shards=1)
    repeat(folder, num_images // DISTINCT)


def write_small(folder: Path, num_examples: int) -> None:
    images = datasets.jpegs(PER_SHARD, size=8)
    datasets.write(folder, images, [i % 1000 for i in range(PER_SHARD)], num_shards=1)
    repeat(folder, num_examples // PER_SHARD)


def repeat(folder: Path, times: int) -> None:
    """Make one shard `times` shards, links to the same file."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    (only,) = manifest["shards"]
    shards = []
    for i in range(times):
        name = f"copy-{i:05}.array_record"
        os.link(folder / only["name"], folder / name)
        shards.append(Shard(**only | {"name": name}))
    (folder / only["name"]).unlink()
    records = np.tile(np.load(folder / RECORDS), times)
    publish(open_store(str(folder)), format="array_record", shards=shards, records=records, classes=None)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=20480)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency", type=float, default=0.03, help="seconds to the first byte")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        as_child(*arguments.child)
        return
    planning()
    with tempfile.TemporaryDirectory() as folder:
        write_big(Path(folder, "big"), arguments.images)
        for n in (10_000, 1_000_000):
            write_small(Path(folder, f"small-{n}"), n)
        with server(Path(folder), arguments.latency):
            rates(Path(folder), arguments.rounds, arguments.images // BATCH * BATCH)
            scale(arguments.images // BATCH * BATCH)


if __name__ == "__main__":
    main()
