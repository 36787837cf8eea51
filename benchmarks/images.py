"""Images a second of decoding, cropping and resizing to 224, beside the bare decoder and what others do.

All sides take turns over the same JPEGs, each image once a round; medians of the rounds. Ratios are of CPU time,
which other programs on the machine do not stretch; images a second are by the clock.
Sides whose packages are not installed are left out. `--write FOLDER` only writes the JPEGs, as FOLDER/0/*.jpg,
for scripts of environments that cannot share this one. Bars: 0.95 of simplejpeg's own loop, 1.1 of tf.data's
fused decode_and_crop_jpeg, 3.5 of torchvision's PIL path.
"""

import argparse
import importlib.util
import io
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import simplejpeg
from _common import print_table
from _images import photographs
from PIL import Image

from configs.schema import AugmentConfig, DataConfig
from trainer.data.images import eval_image, train_image

SIZE = 224
BARE = "simplejpeg's own loop"
PLAIN, ANTIALIASED = "ours", "ours, antialiased"
TORCHVISION, TF_DATA = "torchvision, PIL path", "tf.data, fused decode_and_crop"
BARS = {BARE: 0.95, TF_DATA: 1.1, TORCHVISION: 3.5}

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


def torchvision() -> Side:
    """As ImageNet's reference training does it, to the normalised tensor."""
    import torch
    from torchvision import transforms

    torch.set_num_threads(1)
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    return in_threads(lambda jpeg: transform(Image.open(io.BytesIO(jpeg)).convert("RGB")))


def tf_data() -> Side:
    """As the reference ResNet of TensorFlow does it: the crop is drawn from the header, and decoded alone."""
    import tensorflow as tf

    def example(jpeg: "tf.Tensor") -> "tf.Tensor":
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(jpeg),
            tf.zeros((1, 0, 4)),
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], size[:2]], 0)
        image = tf.image.decode_and_crop_jpeg(jpeg, window, channels=3)
        return tf.cast(tf.image.resize(image, (SIZE, SIZE)), tf.uint8)

    def seconds(jpegs: Sequence[bytes], threads: int) -> tuple[float, float]:
        options = tf.data.Options()
        options.threading.private_threadpool_size = threads
        dataset = tf.data.Dataset.from_tensor_slices(list(jpegs)).map(example, threads).with_options(options)
        return timed(lambda: dataset)

    return seconds


def sides() -> dict[str, Side]:
    found = {
        BARE: in_threads(lambda jpeg: simplejpeg.decode_jpeg(jpeg, "RGB")),
        PLAIN: ours(),
        ANTIALIASED: ours(antialias=True),
        "ours, RandAugment of 2": ours(randaugment=(2, 9)),
        "ours, evaluation": evaluation(),
    }
    for name, package, make in ((TORCHVISION, "torchvision", torchvision), (TF_DATA, "tensorflow", tf_data)):
        if importlib.util.find_spec(package):
            found[name] = make()
        else:
            print(f"{name}: left out, {package} is not installed here")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write the JPEGs there, and leave")
    args = parser.parse_args()
    jpegs = photographs(args.images)
    print(f"{len(jpegs)} JPEGs of {statistics.mean(map(len, jpegs)) / 1000:.0f} kB in the mean")
    if args.write:
        write(jpegs, args.write / "0")
        return
    found = sides()
    for threads in args.threads:
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
        for side in found.values():
            side(jpegs[:8], threads)  # what is compiled or imported at first use
        for _ in range(args.rounds):
            for name, side in found.items():
                seconds[name].append(side(jpegs, threads))
        report(seconds, len(jpegs), threads)


def write(jpegs: Sequence[bytes], folder: Path) -> None:
    """One class of an image folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, jpeg in enumerate(jpegs):
        (folder / f"{i:05d}.jpg").write_bytes(jpeg)


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
    for other, bar in BARS.items():
        if other in seconds:
            print(f"{PLAIN} / {other}: {ratio(PLAIN, other):.3f} (bar: at least {bar})")


if __name__ == "__main__":
    main()
