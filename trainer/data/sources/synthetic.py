"""Noise with labels, for benchmarks: reading costs nothing, so a measurement shows the time of the loop itself."""

import numpy as np

from configs.schema import RunConfig, num_examples
from trainer.data.split import InMemorySplit, Split

DISTINCT = 64
"""Number of distinct samples of a split, which repeat."""


def open_splits(config: RunConfig) -> tuple[Split, Split]:
    """Splits of the configured lengths, each of 64 samples that repeat."""
    num_train, num_eval = num_examples(config.data)
    return _noise(config, num_train, seed=0), _noise(config, num_eval, seed=1)


def _noise(config: RunConfig, length: int, seed: int) -> InMemorySplit:
    rng = np.random.default_rng(seed)
    size, num_classes = config.data.image_size, config.model.num_classes
    images = rng.integers(0, 256, (DISTINCT, size, size, 3), np.uint8)
    labels = rng.integers(0, num_classes, DISTINCT, np.int32)
    return InMemorySplit(images, labels, f"synthetic-v1/{length}/{size}/{num_classes}/{seed}", length=length)
