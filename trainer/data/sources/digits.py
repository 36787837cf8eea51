"""scikit-learn's handwritten digits: 1,797 real images of 8×8 pixels, written once as ArrayRecord.

Alpaydin & Kaynak 1998, https://archive.ics.uci.edu/dataset/80. A record is one byte of label and 64 bytes of
pixels. The folder is published by a rename, so several processes may write it at once.
"""

import hashlib
import shutil
import tempfile
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from grain.sources import ArrayRecordDataSource

from configs.files import cache_folder
from configs.schema import DATASETS, RunConfig
from trainer.data.split import InMemorySplit, Split

SIZE = 8
"""Height and width of an image in pixels."""


def open_splits(config: RunConfig) -> tuple[Split, Split]:
    """The training and the held-out digits; the first call on a machine writes them to the cache folder."""
    folder = cache_folder() / "digits-v1"
    if not folder.is_dir():
        write(folder)
    size = config.data.image_size
    return read(folder / "train.array_record", size), read(folder / "eval.array_record", size)


def read(file: Path, image_size: int) -> InMemorySplit:
    """Read one split. Images are scaled to `image_size`, a multiple of 8, by repeating pixels."""
    source = ArrayRecordDataSource([str(file)])
    records = np.stack([np.frombuffer(source[i], np.uint8) for i in range(len(source))])
    scale = image_size // SIZE
    images = records[:, 1:].reshape(-1, SIZE, SIZE, 1).repeat(scale, 1).repeat(scale, 2).repeat(3, 3)
    return InMemorySplit(
        images, records[:, 0].astype(np.int32), hashlib.sha256(file.read_bytes()).hexdigest()
    )


def write(folder: Path) -> None:
    """Write train.array_record and eval.array_record to `folder`, which appears complete or not at all."""
    from sklearn.datasets import load_digits  # takes 1.5 s to import, and is needed once a machine

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.uint8)
    # Neighbours in the file were written by the same person; a fixed permutation puts each person in both
    # splits.
    order = np.random.default_rng(0).permutation(len(labels))
    num_train = DATASETS["digits"].num_train
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, because a rename does not leave its file system.
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    for name, indices in (("train", order[:num_train]), ("eval", order[num_train:])):
        # One record a group, so that a record can be read by itself.
        writer = ArrayRecordWriter(str(partial / f"{name}.array_record"), "group_size:1,uncompressed")
        for i in indices:
            writer.write(bytes([labels[i]]) + pixels[i].tobytes())
        writer.close()
    try:
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial)
        if not folder.is_dir():  # otherwise another process has published it first
            raise
