"""Decoding: from the bytes of an image file to RGB pixels, for every file type that Pillow reads.

Ordinary JPEGs are decoded by simplejpeg (libjpeg-turbo), which is faster; all other files by Pillow. Both
release the GIL, so that threads decode in parallel.
"""

import functools
import io
import struct
import warnings

import numpy as np
import simplejpeg
from PIL import Image, ImageChops, UnidentifiedImageError

from trainer.data.pixels import jpeg

Encoded = bytes | bytearray | memoryview | np.ndarray
"""The bytes of an image file; an array of them is uint8."""
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
                  struct.error, Image.DecompressionBombError)  # fmt: skip
"""What Pillow's readers raise for damaged files."""


def decode(encoded: Encoded) -> np.ndarray:
    """Decode an image to (height, width, 3) uint8 RGB, turned upright as its EXIF orientation says.

    As torchvision's image loader does, transparency is dropped, 16-bit channels keep their upper 8 bits, and
    of several frames the first is taken. Raises ValueError with the reason if the bytes are not a whole
    image.
    """
    view = bytes_view(encoded)
    header = jpeg.read_header(view)
    if header is None:
        return _decode_with_pillow(view)
    try:
        pixels = simplejpeg.decode_jpeg(view, "RGB")
    except ValueError as e:
        if jpeg.EXTRANEOUS_BYTES not in str(e):
            raise ValueError(f"its JPEG data is damaged or cut off: {e}") from None
        # Extraneous bytes alone are harmless. Pillow raises if the file has other damage, too.
        return _decode_with_pillow(view)
    return _turn_upright(pixels, header.orientation)


def bytes_view(encoded: Encoded) -> memoryview:
    """The bytes of `encoded`, without a copy."""
    return encoded.data if isinstance(encoded, np.ndarray) else memoryview(encoded)


def _turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (CIPA DC-008, 4.6.4): 5 to 8 swap the axes, then rows or columns are mirrored."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    return np.ascontiguousarray(pixels[::rows, ::columns])


def _decode_with_pillow(encoded: memoryview) -> np.ndarray:
    _silence_pillow()
    if not encoded:
        raise ValueError("it is empty")
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
            return _turn_upright(_to_rgb(image), jpeg.exif_orientation(image.info.get("exif", b"")))
    except UnidentifiedImageError:
        raise ValueError(f"it is no image: it begins with {bytes(encoded[:8])!r}") from None
    except _PILLOW_ERRORS as e:
        raise ValueError(f"it does not decode: {e}") from None


@functools.cache
def _silence_pillow() -> None:
    """Ignore Pillow's warnings from now on: they do not name the record, so a user can do nothing with them."""
    # Not warnings.catch_warnings: it changes the filters of the whole process, and other threads decode, too.
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I;16"):
        # convert("RGB") would clip every value above 255.
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.stack([grey] * 3, axis=-1)
    if image.format == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info:
        # Adobe stores CMYK inverted, and Pillow takes every CMYK JPEG for one of Adobe's.
        image = ImageChops.invert(image)
    return np.asarray(image.convert("RGB"))
