"""From the bytes of a record to pixels of the network's size, on the host, in threads: decode, crop, resize.

Usual JPEGs take the short way through simplejpeg (libjpeg-turbo), all else Pillow's; both release the GIL.
"""

import functools
import io
import math
import struct
import warnings
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageChops, UnidentifiedImageError

from configs.schema import AugmentConfig, DataConfig
from trainer.data.randaugment import randaugment

Encoded = bytes | bytearray | memoryview | np.ndarray
"""The file's bytes; an array of them is uint8."""
EVAL_SHARE = 0.875
"""Of the short side that the centre crop of evaluation keeps, unless told: 224 of 256."""
CROP_RATIO = (3 / 4, 4 / 3)
CROP_TRIES = 10
_EXTRANEOUS = "extraneous bytes"
"""In libjpeg's warning that something lies between the last block and the next marker."""
_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""Where Pillow takes an image for a decompression bomb."""
_ORIENTATION_TAG = 0x0112
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
           struct.error, Image.DecompressionBombError)  # fmt: skip
"""What Pillow's readers raise over damaged files."""


class Box(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def train_image(
    encoded: Encoded, *, seed: int, position: int, data: DataConfig, augment: AugmentConfig
) -> np.ndarray:
    """(image_size, image_size, 3) uint8: a random crop, resized, then RandAugment where it is on.

    It depends on the sample's position in the run, not on who decodes it. Raises ValueError with the reason
    where the bytes do not decode.
    """
    draw = sample_rng(seed, position)
    pixels, box = _random_crop(_view(encoded), draw, augment, data.image_size)
    image = _resized(pixels, box, data.image_size, antialias=augment.antialias)
    return randaugment(image, draw, augment) if augment.randaugment[0] else image


def eval_image(encoded: Encoded, *, data: DataConfig) -> np.ndarray:
    """(image_size, image_size, 3) uint8: the centre of the image. Raises ValueError as `train_image`."""
    resize = data.eval_resize or round(data.image_size / EVAL_SHARE)
    return center_crop(decode(encoded), resize, data.image_size)


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The draws for one sample: Philox keyed by (seed, position), so that no two share their stream."""
    return np.random.Generator(np.random.Philox(key=[seed, position]))


def decode(encoded: Encoded) -> np.ndarray:
    """(height, width, 3) uint8 RGB, upright as EXIF says.

    Transparency is dropped as torchvision's loader drops it, 16 bits keep their upper 8, of several frames the
    first is taken. Raises ValueError with the reason.
    """
    view = _view(encoded)
    header = _jpeg_header(view)
    if header is None:
        return _decode_by_pillow(view)
    try:
        pixels = simplejpeg.decode_jpeg(view, "RGB")
    except ValueError as e:
        if _EXTRANEOUS not in str(e):
            raise ValueError(f"its JPEG data is damaged or cut off: {e}") from None
        return _decode_by_pillow(view)  # harmless, unless Pillow finds more
    return _upright(pixels, header.orientation)


def crop_box(height: int, width: int, draw: np.random.Generator, augment: AugmentConfig) -> Box:
    """A random box of an image (Szegedy et al. 2014), as torchvision draws it.

    The area is uniform, the aspect log-uniform; where ten boxes do not fit, the central one that does.
    """
    low, high = CROP_RATIO
    for _ in range(CROP_TRIES):
        area, log_ratio, top, left = draw.random(4).tolist()
        area = (
            height * width * (augment.crop_scale[0] + area * (augment.crop_scale[1] - augment.crop_scale[0]))
        )
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
    """(size, size, 3) uint8: the short side brought to `resize`, then the centre, always antialiased.

    Equal to torchvision's Resize and CenterCrop of a PIL image, but what the crop drops is not computed.
    """
    height, width = image.shape[:2]
    short = min(height, width)
    resized = [resize if side == short else int(resize * side / short) for side in (height, width)]
    starts = [round((side - size) / 2) for side in resized]
    box = [start * old / new for start, old, new in zip(starts, (height, width), resized, strict=True)]
    ends = [
        (start + size) * old / new for start, old, new in zip(starts, (height, width), resized, strict=True)
    ]
    whole = Image.fromarray(image)
    return np.asarray(
        whole.resize((size, size), Image.Resampling.BILINEAR, (box[1], box[0], ends[1], ends[0]))
    )


def _resized(pixels: np.ndarray, box: Box, size: int, *, antialias: bool) -> np.ndarray:
    part = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
    if antialias:
        return np.asarray(Image.fromarray(part).resize((size, size), Image.Resampling.BILINEAR))
    _set_up()
    return cv2.resize(part, (size, size), interpolation=cv2.INTER_LINEAR)


@functools.cache
def _set_up() -> None:
    """Once a process: the reader's threads are the parallelism, and a warning names no record."""
    cv2.setNumThreads(0)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # catch_warnings is not for threads


def _view(encoded: Encoded) -> memoryview:
    return encoded.data if isinstance(encoded, np.ndarray) else memoryview(encoded)


class _JpegHeader(NamedTuple):
    """What is read of a JPEG before it is decoded (ITU-T T.81, appendix B)."""

    height: int
    width: int
    height_at: int
    """Byte at which the height is written."""
    is_sequential: bool
    orientation: int
    """By EXIF, 1 to 8."""


def _random_crop(
    encoded: memoryview, draw: np.random.Generator, augment: AugmentConfig, size: int
) -> tuple[np.ndarray, Box]:
    """Pixels, and the random box of them; what lies below the box may be missing."""
    header = _jpeg_header(encoded)
    if (
        header is not None
        and header.orientation == 1
        and header.is_sequential
        and encoded[-2:] == b"\xff\xd9"
    ):
        box = crop_box(header.height, header.width, draw, augment)
        # Shrinking while decoding averages blocks of pixels, which no bilinear resize here does.
        shrink = 1 if augment.antialias else min(box.height // size, box.width // size, 8)
        shrink = 1 << max(shrink, 1).bit_length() - 1  # libjpeg-turbo is fast at 1/2, 1/4 and 1/8 alone
        pixels = _decode_top(encoded, header, box.top + box.height, shrink)
        if pixels is not None:
            return pixels, _shrunk(box, shrink)
        return decode(encoded), box
    pixels = decode(encoded)
    height, width = pixels.shape[:2]
    return pixels, crop_box(height, width, draw, augment)


def _shrunk(box: Box, shrink: int) -> Box:
    if shrink == 1:
        return box
    top, left, bottom, right = (
        round(x / shrink) for x in (box.top, box.left, box.top + box.height, box.left + box.width)
    )
    return Box(top, left, bottom - top, right - left)


def _decode_top(encoded: memoryview, header: _JpegHeader, bottom: int, shrink: int) -> np.ndarray | None:
    """The pixels above row `bottom` and two below, both sides divided by `shrink`; None if there are doubts.

    A sequential JPEG is coded from the top down, so one that is said to end early is decoded that far. What
    follows is then extraneous, and libjpeg's one complaint where the rest is in order; the pixels are there.
    """
    height = min(
        header.height, bottom + 2 * shrink
    )  # colours of the rows below are smoothed into those above
    shorter = bytearray(encoded)
    struct.pack_into(">H", shorter, header.height_at, height)
    rows, columns = -(-height // shrink), -(-header.width // shrink)
    pixels = np.empty((rows, columns, 3), np.uint8)
    try:
        simplejpeg.decode_jpeg(
            shorter, "RGB", min_height=rows, min_width=columns, min_factor=shrink, buffer=pixels
        )
    except ValueError as e:
        if height == header.height or _EXTRANEOUS not in str(e):
            return None
    return pixels


def _jpeg_header(encoded: memoryview) -> _JpegHeader | None:
    """The header of a JPEG of 8 bits in grey or three colours; None for all else."""
    if encoded[:2] != b"\xff\xd8":
        return None
    at = 2
    orientation: int | None = None
    while at + 10 <= len(encoded) and encoded[at] == 0xFF:
        marker, length = encoded[at + 1], encoded[at + 2] << 8 | encoded[at + 3]
        if marker == 0xE1 and orientation is None and encoded[at + 4 : at + 10] == b"Exif\0\0":  # not XMP
            orientation = _orientation(bytes(encoded[at + 4 : at + 2 + length]))
        elif 0xC0 <= marker <= 0xC2:
            precision, height, width, components = struct.unpack_from(">BHHB", encoded, at + 4)
            if precision != 8 or components not in (1, 3) or not 0 < height * width <= _MAX_PIXELS:
                return None
            return _JpegHeader(height, width, at + 5, marker != 0xC2, orientation or 1)
        elif marker >= 0xC0 and marker <= 0xCF and marker != 0xC4:
            return None
        at += 2 + length
    return None


def _orientation(exif: bytes) -> int:
    """Orientation by an EXIF block (CIPA DC-008, 4.6.4), 1 where it has none or is damaged."""
    if exif[:6] == b"Exif\0\0":
        exif = exif[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (first,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, first)
        for entry in range(first + 2, first + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(order + "HHIH", exif, entry)
            if tag == _ORIENTATION_TAG:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Orientation 5 to 8 swap the axes; 2, 3, 6 and 7 then mirror columns, 3, 4, 7 and 8 rows."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    return np.ascontiguousarray(pixels[::rows, ::columns])


def _decode_by_pillow(encoded: memoryview) -> np.ndarray:
    _set_up()
    if not encoded:
        raise ValueError("it is empty")
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
            return _upright(_rgb(image), _orientation(image.info.get("exif", b"")))
    except UnidentifiedImageError:
        raise ValueError(f"it is no image: it begins with {bytes(encoded[:8])!r}") from None
    except _BROKEN as e:
        raise ValueError(f"it does not decode: {e}") from None


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):  # convert() would clip what is above 255
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.stack([grey] * 3, axis=-1)
    if image.format == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info:
        image = ImageChops.invert(
            image
        )  # Pillow takes every CMYK JPEG for one of Adobe's, which are negatives
    return np.asarray(image.convert("RGB"))
