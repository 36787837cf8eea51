"""scikit-learn's handwritten digits: 1,797 real images of 8×8, written once as ArrayRecord.

Alpaydin & Kaynak 1998, https://archive.ics.uci.edu/dataset/80. A record is one byte of label and 64 bytes
of pixels. The folder is published by a rename, so several processes may write it at once.
"""

import hashlib
import shutil
import tempfile
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from grain.sources import ArrayRecordDataSource

from configs.files import cache_folder
from configs.schema import DATASETS, DataConfig
from trainer.data.split import Sample, Split

SIZE = 8


class Digits:
    """One split, read record by record. Images are repeated to `image_size`, a multiple of 8."""

    def __init__(self, file: Path, image_size: int):
        self._records = ArrayRecordDataSource([str(file)])
        self._scale = image_size // SIZE
        self.digest = hashlib.sha256(file.read_bytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        record = np.frombuffer(self._records[index], np.uint8)
        image = record[1:].reshape(SIZE, SIZE, 1).repeat(self._scale, 0).repeat(self._scale, 1)
        return Sample(image.repeat(3, 2), record[0].astype(np.int32))


def open_splits(data: DataConfig, num_classes: int) -> tuple[Split, Split]:
    folder = cache_folder() / "digits-v1"
    if not folder.is_dir():
        write(folder)
    return tuple(Digits(folder / f"{s}.array_record", data.image_size) for s in ("train", "eval"))  # type: ignore[return-value]


def write(folder: Path) -> None:
    """Write train.array_record and eval.array_record to `folder`, which appears whole or not at all."""
    from sklearn.datasets import load_digits  # 1.5 s to import, needed once a machine

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.uint8)
    # Neighbours in the file share a writer; a fixed permutation spreads them over both splits.
    order = np.random.default_rng(0).permutation(len(labels))
    num_train = DATASETS["digits"].num_train
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    for name, indices in (("train", order[:num_train]), ("eval", order[num_train:])):
        writer = ArrayRecordWriter(str(partial / f"{name}.array_record"), "group_size:1,uncompressed")
        for i in indices:
            writer.write(bytes([labels[i]]) + pixels[i].tobytes())
        writer.close()
    try:
        partial.rename(folder)
    except OSError:
        shutil.rmtree(partial)
        if not folder.is_dir():  # else another process was first
            raise
