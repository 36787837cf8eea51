"""A picture, encoded in many ways, and the crop of it that training should make."""

import io

import cv2
import numpy as np
from PIL import Image

from configs.schema import AugmentConfig, DataConfig
from trainer.data.pixels.transform import random_crop_box, sample_rng

HEIGHT, WIDTH = 90, 130
PLAIN = AugmentConfig()
ANTIALIASED = AugmentConfig(antialias=True)


def picture(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Smooth, so that JPEG keeps it, and no two corners are alike."""
    y, x = np.mgrid[:height, :width]
    channels = [200 * x / width + 20, 200 * y / height + 20, 100 + 80 * np.sin(x / 9) * np.cos(y / 7)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def encoded(image: np.ndarray | Image.Image, format: str, **settings: object) -> bytes:  # noqa: A002
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, format, **settings)
    return buffer.getvalue()


def jpeg(quality: int = 95, subsampling: str = "4:2:0", **settings: object) -> bytes:
    return encoded(picture(), "JPEG", quality=quality, subsampling=subsampling, **settings)


def data(image_size: int, eval_resize: int | None = None) -> DataConfig:
    return DataConfig(source="digits", image_size=image_size, eval_resize=eval_resize)


def by_hand(pixels: np.ndarray, position: int, size: int, augment: AugmentConfig = PLAIN) -> np.ndarray:
    """The crop of a picture that has been decoded whole."""
    box = random_crop_box(*pixels.shape[:2], sample_rng(0, position), augment)
    part = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
    if augment.antialias:
        return np.asarray(Image.fromarray(part).resize((size, size), Image.Resampling.BILINEAR))
    return cv2.resize(part, (size, size), interpolation=cv2.INTER_LINEAR)
