"""Images a second of decoding, cropping and resizing to 224, beside the bare decoder's own loop.

All sides take turns over the same JPEGs, each image once a round; medians of the rounds. Ratios are of CPU time,
which other programs on the machine do not stretch; images a second are by the clock. benchmarks/rivals.py has
what other loaders do. Bar: 0.95 of simplejpeg's own loop.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import simplejpeg

from benchmarks._common import print_table
from benchmarks._images import photographs
from configs.schema import AugmentConfig, DataConfig
from trainer.data.pixels.transform import eval_image, train_image

SIZE = 224
BARE = "simplejpeg's own loop"
PLAIN, ANTIALIASED = "ours", "ours, antialiased"
BAR = 0.95

Side = Callable[[Sequence[bytes], int], tuple[float, float]]
"""(JPEGs, threads) -> seconds by the clock and of CPU to bring each to SIZE once."""


def timed(images: Callable[[], Iterable[object]]) -> tuple[float, float]:
    begun, cpu_begun = time.perf_counter(), time.process_time()
    for _ in images():
        pass
    return time.perf_counter() - begun, time.process_time() - cpu_begun


def in_threads(work: Callable[[bytes], object]) -> Side:
    def seconds(jpegs: Sequence[bytes], threads: int) -> tuple[float, float]:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, jpegs[: 2 * threads]))  # the threads are there
            return timed(lambda: pool.map(work, jpegs))

    return seconds


def ours(**settings: bool | int) -> Side:
    data, augment = DataConfig(source="digits", image_size=SIZE), AugmentConfig(**settings)
    positions = itertools.count()
    return in_threads(
        lambda jpeg: train_image(jpeg, seed=0, position=next(positions), data=data, augment=augment)
    )


def evaluation() -> Side:
    data = DataConfig(source="digits", image_size=SIZE)
    return in_threads(lambda jpeg: eval_image(jpeg, data=data))


def sides() -> dict[str, Side]:
    return {
        BARE: in_threads(lambda jpeg: simplejpeg.decode_jpeg(jpeg, "RGB")),
        PLAIN: ours(),
        ANTIALIASED: ours(antialias=True),
        "ours, RandAugment of 2": ours(randaugment=(2, 9)),
        "ours, evaluation": evaluation(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    jpegs = photographs(args.images)
    print(f"{len(jpegs)} JPEGs of {statistics.mean(map(len, jpegs)) / 1000:.0f} kB in the mean")
    found = sides()
    for threads in args.threads:
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
        for side in found.values():
            side(jpegs[:8], threads)  # what is compiled or imported at first use
        for _ in range(args.rounds):
            for name, side in found.items():
                seconds[name].append(side(jpegs, threads))
        report(seconds, len(jpegs), threads)


def report(seconds: dict[str, list[tuple[float, float]]], images: int, threads: int) -> None:
    def ratio(name: str, other: str) -> float:
        """How many times as fast, median of the rounds."""
        return statistics.median(b[1] / a[1] for a, b in zip(seconds[name], seconds[other], strict=True))

    table = []
    for name, rounds in seconds.items():
        clock, cpu = (statistics.median(column) for column in zip(*rounds, strict=True))
        table.append([name, f"{images / clock:.0f}", f"{1e3 * cpu / images:.2f}", f"{ratio(name, BARE):.3f}"])
    threads_in_words = f"{threads} thread{'s' * (threads > 1)}"
    print_table([threads_in_words, "images/s", "CPU ms/image", "of simplejpeg's"], table)
    print(f"{PLAIN} / {BARE}: {ratio(PLAIN, BARE):.3f} (bar: at least {BAR})")


if __name__ == "__main__":
    main()
