"""`launch data inspect`: the contents of a dataset in figures, and as a contact sheet."""

import io
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from configs.errors import UserError
from trainer.data.storage.dataset import Dataset
from trainer.data.storage.fetch import Fetcher
from trainer.data.tools.verify import find_fault
from trainer.grid import captioned_grid

TILE = 128
"""Side of an image on the contact sheet, in pixels."""
CAPTION_CHARACTERS = 20


@dataclass(frozen=True)
class Summary:
    """Figures on a dataset that its table alone gives."""

    num_bytes: int
    """Total size of the encoded images."""
    smallest: int
    mean: float
    largest: int
    """Smallest, mean and largest size of an image in bytes."""
    counts: np.ndarray
    """(labels,) int64: the number of images of each label, from 0 to the largest."""
    sorted_by_class: bool
    """Whether most neighbours share a class, far more often than by chance."""


def summarize(dataset: Dataset) -> Summary:
    """The figures of a dataset."""
    lengths, labels = dataset.records["length"], dataset.records["label"].astype(np.int64)
    counts = np.bincount(labels, minlength=len(dataset.manifest.classes or ()))
    by_chance = float(np.square(counts / len(labels)).sum())
    shared = float(np.mean(labels[1:] == labels[:-1])) if len(labels) > 1 else 0.0
    return Summary(
        num_bytes=int(lengths.sum()),
        smallest=int(lengths.min()),
        mean=float(lengths.mean()),
        largest=int(lengths.max()),
        counts=counts,
        # The threshold lies halfway between the share that chance gives and 1.
        sorted_by_class=shared > (1 + by_chance) / 2,
    )


def write_sheet(dataset: Dataset, file: Path, count: int) -> int:
    """Draw up to `count` evenly spaced images with their classes to a PNG. Returns how many there are.

    Raises UserError if one of them is damaged.
    """
    from trainer.data.pixels.decode import decode

    # Evenly spaced, since the first records may all be of one class.
    chosen = np.unique(np.linspace(0, len(dataset) - 1, count).round().astype(np.int64))
    tiles, captions = [], []
    for index, encoded in zip(chosen, _read(dataset, chosen), strict=True):
        if reason := find_fault(encoded, int(dataset.records["crc32c"][index]), decode=True):
            raise UserError(
                f"{dataset.describe(int(index))}: {reason}; `launch data verify` names all that are bad"
            )
        label = int(dataset.records["label"][index])
        classes = dataset.manifest.classes
        captions.append((classes[label] if classes else str(label))[:CAPTION_CHARACTERS])
        tiles.append(np.asarray(ImageOps.pad(Image.fromarray(decode(encoded)), (TILE, TILE), color="white")))
    sheet = io.BytesIO()
    Image.fromarray(captioned_grid(np.stack(tiles), captions)).save(sheet, "PNG")
    file.write_bytes(sheet.getvalue())
    return len(tiles)


def _read(dataset: Dataset, indices: np.ndarray) -> list[bytes]:
    """The encoded images of single records."""
    with closing(Fetcher()) as fetcher:
        futures = [fetcher.submit(dataset.request(int(i), int(i))) for i in indices]
        return [future.result().tobytes() for future in futures]
