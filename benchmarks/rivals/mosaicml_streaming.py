"""MosaicML Streaming: its writer, and its StreamingDataset in torch's DataLoader, with our decoding."""

import sys
from pathlib import Path

from _decoding import decoded
from _timing import BATCH, SHARD_BYTES, Pass, batches, files, run, run_conversion, sample
from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader


def write(source: Path, destination: Path) -> None:
    columns = {"image": "bytes", "label": "int"}
    with MDSWriter(out=str(destination), columns=columns, size_limit=SHARD_BYTES) as writer:
        for file in files(source):
            writer.write(sample(file))


class Images(StreamingDataset):
    def __getitem__(self, i: int):
        record = super().__getitem__(i)
        return decoded(record["image"]), record["label"]


def stream(folder: Path, cores: int) -> Pass:
    shards, num_images = folder / "mosaicml", len(files(folder / "images"))
    if not shards.exists():
        write(folder / "images", shards)
    images = Images(local=str(shards), shuffle=True, batch_size=BATCH, epoch_size=100 * num_images)
    workers = 0 if cores == 1 else cores  # alone on its core, a worker is only in the way
    return batches(iter(DataLoader(images, BATCH, num_workers=workers)), num_images)


if sys.argv[1] == "convert":
    run_conversion(write)
else:
    run(stream=stream)
