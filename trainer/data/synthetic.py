"""Noise with labels, for benchmarks: reading costs nothing, so what is left is the loop's own time."""

import numpy as np

from configs.schema import DataConfig, num_examples
from trainer.data.split import Sample, Split

DISTINCT = 64


class Synthetic:
    """`length` samples that cycle through 64 distinct ones."""

    def __init__(self, length: int, image_size: int, num_classes: int, seed: int):
        rng = np.random.default_rng(seed)
        self._images = rng.integers(0, 256, (DISTINCT, image_size, image_size, 3), np.uint8)
        self._labels = rng.integers(0, num_classes, DISTINCT, np.int32)
        self._length = length
        self.digest = f"synthetic-v1/{length}/{image_size}/{num_classes}/{seed}"

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        return Sample(self._images[index % DISTINCT], self._labels[index % DISTINCT])


def open_splits(data: DataConfig, num_classes: int) -> tuple[Split, Split]:
    num_train, num_eval = num_examples(data)
    return (
        Synthetic(num_train, data.image_size, num_classes, seed=0),
        Synthetic(num_eval, data.image_size, num_classes, seed=1),
    )
