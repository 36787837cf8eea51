"""Photographs of ImageNet's usual size, as JPEGs: what the benchmarks of reading and decoding read."""

import io

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

SIZE = (500, 375)
QUALITIES = (95, 99)  # upper bound excluded
SUBSAMPLINGS = ("4:4:4", "4:2:0")


def photographs(n: int, seed: int = 0) -> list[bytes]:
    """`n` different JPEGs of 500×375 or 375×500, 110 KB in the mean, as ImageNet's are.

    Each is a crop of one of scikit-learn's two sample photographs, mirrored or not, at an aspect and a zoom
    of its own: noise would take the entropy decoder several times as long as any photograph.
    """
    rng = np.random.default_rng(seed)
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    return [_photograph(sources[i % len(sources)], rng) for i in range(n)]


def _photograph(source: Image.Image, rng: np.random.Generator) -> bytes:
    size = SIZE if rng.random() < 0.75 else SIZE[::-1]
    fit = min(source.width / size[0], source.height / size[1])
    width, height = (side * fit * rng.uniform(0.85, 1) for side in size)
    left, top = rng.uniform(0, source.width - width), rng.uniform(0, source.height - height)
    image = source.resize(size, Image.Resampling.BICUBIC, (left, top, left + width, top + height))
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    encoded = io.BytesIO()
    image.save(
        encoded, "JPEG", quality=int(rng.integers(*QUALITIES)), subsampling=SUBSAMPLINGS[rng.integers(2)]
    )
    return encoded.getvalue()
