"""WebDataset: tar shards through its WebLoader, with our decoding."""

from pathlib import Path

import webdataset
from _decoding import decoded
from _timing import BATCH, Pass, batches, files, run, sample

NUM_SHARDS = 8
SHUFFLE = 1000
"""Records that are shuffled among each other, as its examples have it."""


def write(source: Path, destination: Path) -> None:
    destination.mkdir()
    sources = files(source)
    pattern, per_shard = str(destination / "%06d.tar"), -(-len(sources) // NUM_SHARDS)
    with webdataset.ShardWriter(pattern, maxcount=per_shard, verbose=0) as writer:
        for i, record in enumerate(map(sample, sources)):
            writer.write({"__key__": f"{i:06}", "jpg": record["image"], "cls": record["label"]})


def stream(folder: Path, cores: int) -> Pass:
    shards, num_images = folder / "webdataset", len(files(folder / "images"))
    if not shards.exists():
        write(folder / "images", shards)
    names = sorted(map(str, shards.glob("*.tar")))
    records = webdataset.WebDataset(names, resampled=True).shuffle(SHUFFLE).to_tuple("jpg", "cls")
    dataset = records.map_tuple(decoded, int).batched(BATCH)
    workers = 0 if cores == 1 else cores  # alone on its core, a worker is only in the way
    return batches(iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)), num_images)


run(stream=stream)
