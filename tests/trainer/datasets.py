"""Small datasets, written as `launch data convert` lays them out."""

import io
import struct
from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from trainer.data.storage.dataset import RECORD_DTYPE, Manifest, Shard, publish
from trainer.data.storage.formats import array_record, example, tfrecord
from trainer.data.storage.store import open_store


def jpegs(n: int, size: int = 12, seed: int = 0) -> list[bytes]:
    """Images that differ, smooth enough to survive JPEG."""
    rng = np.random.default_rng(seed)
    images = []
    for corners in rng.integers(0, 256, (n, 2, 2, 3), np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(corners).resize((size, size)).save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    return images


def blobs(n: int, size: int = 5000, seed: int = 0) -> list[bytes]:
    """Bytes that are no images, of about `size`."""
    rng = np.random.default_rng(seed)
    return [rng.bytes(int(k)) for k in rng.integers(size // 2, 3 * size // 2, n)]


def write_tfrecord(file: Path, images: Sequence[bytes], labels: Sequence[int]) -> None:
    """A TFRecord of tf.train.Example."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as f:
        for image, label in zip(images, labels, strict=True):
            record = example.serialize(image, label)
            length = struct.pack("<Q", len(record))
            for part in (length, record):
                f.write(part + struct.pack("<I", tfrecord.masked_crc32c(part)))


def write(
    folder: Path,
    images: Sequence[bytes],
    labels: Sequence[int] | None = None,
    *,
    num_shards: int = 3,
    classes: Sequence[str] | None = None,
) -> Manifest:
    """ArrayRecord shards in `folder`, their rows and their manifest. Labels count up unless given."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = range(len(images)) if labels is None else labels
    shards, rows = [], []
    for number, part in enumerate(np.array_split(np.arange(len(images)), num_shards)):
        file = folder / f"part-{number:05}-of-{num_shards:05}.array_record"
        writer = ArrayRecordWriter(str(file), array_record.OPTIONS)
        for i in part:
            writer.write(example.serialize(images[i], labels[i]))
        writer.close()
        with file.open("rb") as f:
            entries = list(array_record.scan(f))
        rows += [(e.offset, e.length, google_crc32c.value(e.image), e.label) for e in entries]
        content = file.read_bytes()
        shards.append(Shard(file.name, len(content), google_crc32c.value(content), len(entries)))
    return publish(
        open_store(str(folder)),
        format="array_record",
        shards=shards,
        records=np.array(rows, RECORD_DTYPE),
        classes=classes,
    )
