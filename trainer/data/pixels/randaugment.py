"""RandAugment (Cubuk et al. 2019, arXiv:1909.13719) on the host: a few operations drawn from fourteen, of one
strength.

Operations, ranges and rounding are those of torchvision.transforms.RandAugment, which fills with black.
"""

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from configs.schema import AugmentConfig

BINS = 31
"""Number of magnitudes: 0 to 30."""

Operation = Callable[[Image.Image, float], Image.Image]
"""Takes an RGB image and a strength, 0 to 1 or -1 to 1, and returns an image of the same size."""


def _affine(image: Image.Image, *coefficients: float) -> Image.Image:
    """Move pixels: the one at (x, y) comes from (ax + by + c, dx + ey + f), from the nearest pixel there."""
    return image.transform(image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.NEAREST)


# Half of the time the strength of these is negative.
SIGNED: dict[str, Operation] = {
    "shear_x": lambda image, s: _affine(image, 1, 0.3 * s, 0, 0, 1, 0),
    "shear_y": lambda image, s: _affine(image, 1, 0, 0, 0.3 * s, 1, 0),
    "translate_x": lambda image, s: _affine(image, 1, 0, -int(150 / 331 * image.width * s), 0, 1, 0),
    "translate_y": lambda image, s: _affine(image, 1, 0, 0, 0, 1, -int(150 / 331 * image.height * s)),
    "rotate": lambda image, s: image.rotate(30 * s, Image.Resampling.NEAREST),
    "brightness": lambda image, s: ImageEnhance.Brightness(image).enhance(1 + 0.9 * s),
    "color": lambda image, s: ImageEnhance.Color(image).enhance(1 + 0.9 * s),
    "contrast": lambda image, s: ImageEnhance.Contrast(image).enhance(1 + 0.9 * s),
    "sharpness": lambda image, s: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * s),
}
UNSIGNED: dict[str, Operation] = {
    "identity": lambda image, s: image,
    "posterize": lambda image, s: ImageOps.posterize(image, 8 - round(4 * s)),
    "solarize": lambda image, s: ImageOps.solarize(image, math.ceil(255 * (1 - s))),
    "autocontrast": lambda image, s: ImageOps.autocontrast(image),
    "equalize": lambda image, s: ImageOps.equalize(image),
}
_NAMES = [*SIGNED, *UNSIGNED]


def randaugment(image: np.ndarray, rng: np.random.Generator, augment: AugmentConfig) -> np.ndarray:
    """Apply operations to (height, width, 3) uint8; returns the same shape.

    `augment.randaugment` is the number of operations, drawn with replacement, and their magnitude.
    """
    num_ops, magnitude = augment.randaugment
    strength = magnitude / (BINS - 1)
    changed = Image.fromarray(image)
    for choice, sign in rng.random((num_ops, 2)).tolist():
        name = _NAMES[int(choice * len(_NAMES))]
        if name in SIGNED:
            changed = SIGNED[name](changed, strength if sign < 0.5 else -strength)
        else:
            changed = UNSIGNED[name](changed, strength)
    return np.asarray(changed)
