"""Ours, in our own environment: the bare decoder, decoding and cropping, the whole stream, conversion."""

import functools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import simplejpeg
from _decoding import decoded
from _timing import BATCH, Pass, batches, files, jpegs, run, run_conversion

from configs.load import load
from configs.schema import AugmentConfig
from trainer.data.tools.convert import Settings, convert

RECIPE = Path(__file__).parent.parent.parent / "configs" / "r50.yaml"


def in_threads(work: Callable[[bytes], object]) -> Callable[[Path, int], Pass]:
    def side(folder: Path, cores: int) -> Pass:
        encoded, pool = jpegs(folder), ThreadPoolExecutor(cores)
        return lambda: sum(1 for _ in pool.map(work, encoded))

    return side


def write(source: Path, destination: Path) -> None:
    quiet = lambda *_: lambda *_: None  # noqa: E731
    convert(str(source), str(destination), Settings("imagefolder"), jobs=1, begin=quiet)


def stream(folder: Path, cores: int) -> Pass:
    """As training reads it, to batches that lie on JAX's device."""
    from trainer.data import open_splits
    from trainer.data.batches import train_batches
    from trainer.mesh import batch_sharding, make_mesh

    shards, num_images = folder / "podlaunch", len(files(folder / "images"))
    if not shards.exists():
        write(folder / "images", shards)
    split = f"{{path: '{shards}', num_examples: {num_images}}}"
    settings = [f"train.batch_size={BATCH}", f"data.read_threads={cores}", "mesh.batch=1"]
    config = load(RECIPE, [f"data.train={split}", f"data.eval={split}", *settings])
    train, _ = open_splits(config)
    steps = 2 * num_images // BATCH  # run() takes two passes
    return batches(
        train_batches(config, train, batch_sharding(make_mesh(1, 1)), position=0, steps=steps), num_images
    )


if sys.argv[1] == "convert":
    run_conversion(write)
else:
    run(
        bare=in_threads(functools.partial(simplejpeg.decode_jpeg, colorspace="RGB")),
        decode=in_threads(decoded),
        antialiased=in_threads(functools.partial(decoded, augment=AugmentConfig(antialias=True))),
        stream=stream,
    )
