"""The transforms of training and of evaluation on the host: decode, crop, resize, RandAugment.

Flips, colours and mixing follow on the devices (trainer/augment.py).
"""

import functools
import math
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from configs.schema import AugmentConfig, DataConfig
from trainer.data.pixels import jpeg
from trainer.data.pixels.decode import Encoded, bytes_view, decode
from trainer.data.pixels.randaugment import randaugment

CENTER_CROP_FRACTION = 0.875
"""The centre crop of evaluation keeps this fraction of the short side by default: 224 of 256."""
CROP_ASPECT_RATIO = (3 / 4, 4 / 3)
CROP_TRIES = 10


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def train_image(
    encoded: Encoded, *, seed: int, position: int, data: DataConfig, augment: AugmentConfig
) -> np.ndarray:
    """Decode an image for training: a random crop, resized, then RandAugment where the recipe asks for it.

    Returns (image_size, image_size, 3) uint8. The random draws depend on the seed and on the sample's
    position in the run, so every host makes the same image of it. Raises ValueError with the reason if the
    bytes do not decode.
    """
    rng = sample_rng(seed, position)
    pixels, box = _decode_random_crop(bytes_view(encoded), rng, augment, data.image_size)
    # The crop's draws come first, so RandAugment, on or off, does not change the crop.
    image = _crop_and_resize(pixels, box, data.image_size, antialias=augment.antialias)
    return randaugment(image, rng, augment) if augment.randaugment[0] else image


def eval_image(encoded: Encoded, *, data: DataConfig) -> np.ndarray:
    """Decode an image for evaluation: its centre, (image_size, image_size, 3) uint8.

    Raises ValueError with the reason if the bytes do not decode.
    """
    resize = data.eval_resize or round(data.image_size / CENTER_CROP_FRACTION)
    return center_crop(decode(encoded), resize, data.image_size)


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The random generator of one sample. No two samples share a stream: the Philox key is (seed, position)."""
    return np.random.Generator(np.random.Philox(key=[seed, position]))


def random_crop_box(height: int, width: int, rng: np.random.Generator, augment: AugmentConfig) -> Box:
    """Draw a crop of an image as torchvision's RandomResizedCrop does (Szegedy et al. 2014).

    The area is uniform within `augment.crop_scale`, the aspect ratio log-uniform. Where ten boxes in turn do
    not fit into the image, the largest central box of an allowed ratio is taken.
    """
    smallest, largest = augment.crop_scale
    low, high = CROP_ASPECT_RATIO
    # Always four draws a try, so that all draws after the crop depend on the number of tries alone.
    for _ in range(CROP_TRIES):
        area, log_ratio, top, left = rng.random(4).tolist()
        area = height * width * (smallest + area * (largest - smallest))
        ratio = math.exp(math.log(low) + log_ratio * math.log(high / low))
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < h <= height and 0 < w <= width:
            return Box(int(top * (height - h + 1)), int(left * (width - w + 1)), h, w)
    h, w = height, width
    if width / height < low:
        h = max(1, round(width / low))
    elif width / height > high:
        w = max(1, round(height * high))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def center_crop(image: np.ndarray, resize: int, size: int) -> np.ndarray:
    """Resize the short side of an image to `resize` pixels, antialiased, and cut out the centre.

    `image` is (height, width, 3) uint8. Returns (size, size, 3) uint8, equal to torchvision's Resize and
    CenterCrop of a PIL image. Only the pixels within the crop are computed.
    """
    sides = image.shape[:2]
    resized = [resize if side == min(sides) else int(resize * side / min(sides)) for side in sides]
    starts = [round((side - size) / 2) for side in resized]
    # The crop in pixels of the original image, which Pillow resizes in one go.
    top, left = (start * old / new for start, old, new in zip(starts, sides, resized, strict=True))
    bottom, right = (
        (start + size) * old / new for start, old, new in zip(starts, sides, resized, strict=True)
    )
    whole = Image.fromarray(image)
    return np.asarray(whole.resize((size, size), Image.Resampling.BILINEAR, (left, top, right, bottom)))


def _decode_random_crop(
    encoded: memoryview, rng: np.random.Generator, augment: AugmentConfig, size: int
) -> tuple[np.ndarray, Box]:
    """Decode an image as far as a random crop needs it: the pixels, and the crop as a box of these pixels."""
    header = jpeg.read_header(encoded)
    is_plain = header is not None and header.orientation == 1 and header.is_sequential
    if header is None or not is_plain or encoded[-2:] != jpeg.END_OF_IMAGE:
        pixels = decode(encoded)
        height, width = pixels.shape[:2]
        return pixels, random_crop_box(height, width, rng, augment)
    box = random_crop_box(header.height, header.width, rng, augment)
    # The decoder shrinks by averaging blocks of pixels; an antialiased resize needs every pixel instead.
    shrink = 1 if augment.antialias else min(box.height // size, box.width // size, 8)
    # libjpeg-turbo has fast code for 1/2, 1/4 and 1/8 alone, so round down to a power of two.
    shrink = 1 << max(shrink, 1).bit_length() - 1
    top_rows = jpeg.decode_top(encoded, header, box.top + box.height, shrink)
    if top_rows is None:
        return decode(encoded), box
    return top_rows, _shrink_box(box, shrink)


def _shrink_box(box: Box, shrink: int) -> Box:
    """The box in an image that is smaller by the factor `shrink`."""
    if shrink == 1:
        return box
    top, left, bottom, right = (
        round(x / shrink) for x in (box.top, box.left, box.top + box.height, box.left + box.width)
    )
    return Box(top, left, bottom - top, right - left)


def _crop_and_resize(pixels: np.ndarray, box: Box, size: int, *, antialias: bool) -> np.ndarray:
    crop = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
    if antialias:
        return np.asarray(Image.fromarray(crop).resize((size, size), Image.Resampling.BILINEAR))
    _limit_opencv_threads()
    return cv2.resize(crop, (size, size), interpolation=cv2.INTER_LINEAR)


@functools.cache
def _limit_opencv_threads() -> None:
    """Have OpenCV resize in the calling thread: the reading threads are the parallelism already."""
    cv2.setNumThreads(0)
