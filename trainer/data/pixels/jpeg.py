"""JPEG files from the inside: the size and orientation in the header, and decoding no further than a crop."""

import struct
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

EXTRANEOUS_BYTES = "extraneous bytes"
"""Part of libjpeg's warning that something lies between the last block and the next marker."""
END_OF_IMAGE = b"\xff\xd9"
_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""Pillow refuses larger images as decompression bombs."""
_ORIENTATION_TAG = 0x0112


class JpegHeader(NamedTuple):
    """What decoding needs to know of a JPEG beforehand (ITU-T T.81, appendix B)."""

    height: int
    width: int
    height_at: int
    """Offset in the file, in bytes, of the two bytes that hold the height."""
    is_sequential: bool
    """Whether the rows are stored from top to bottom in one pass; a progressive JPEG takes several."""
    orientation: int
    """EXIF orientation, 1 to 8."""


def read_header(encoded: memoryview) -> JpegHeader | None:
    """Read the header of a JPEG of 8 bits a channel, grey or in three colours; None for every other file."""
    if encoded[:2] != b"\xff\xd8":
        return None
    at = 2
    orientation: int | None = None
    while at + 10 <= len(encoded) and encoded[at] == 0xFF:
        marker, length = encoded[at + 1], encoded[at + 2] << 8 | encoded[at + 3]
        # XMP metadata has the same marker, 0xE1.
        if marker == 0xE1 and orientation is None and encoded[at + 4 : at + 10] == b"Exif\0\0":
            orientation = exif_orientation(bytes(encoded[at + 4 : at + 2 + length]))
        # Baseline, extended sequential and progressive.
        elif 0xC0 <= marker <= 0xC2:
            precision, height, width, components = struct.unpack_from(">BHHB", encoded, at + 4)
            if precision != 8 or components not in (1, 3) or not 0 < height * width <= _MAX_PIXELS:
                return None
            return JpegHeader(height, width, at + 5, marker != 0xC2, orientation or 1)
        # Lossless and arithmetic coding, which libjpeg-turbo may not know. 0xC4 is a Huffman table.
        elif marker >= 0xC0 and marker <= 0xCF and marker != 0xC4:
            return None
        at += 2 + length
    return None


def exif_orientation(exif: bytes) -> int:
    """The orientation, 1 to 8, in an EXIF block (CIPA DC-008, 4.6.4); 1 if there is none."""
    if exif[:6] == b"Exif\0\0":
        exif = exif[6:]
    byte_order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if byte_order is None:
        return 1
    try:
        (first,) = struct.unpack_from(byte_order + "I", exif, 4)
        (count,) = struct.unpack_from(byte_order + "H", exif, first)
        for entry in range(first + 2, first + 2 + 12 * count, 12):
            tag, _, _, value = struct.unpack_from(byte_order + "HHIH", exif, entry)
            if tag == _ORIENTATION_TAG:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def decode_top(encoded: memoryview, header: JpegHeader, bottom: int, shrink: int) -> np.ndarray | None:
    """Decode a sequential JPEG down to row `bottom`, with both sides divided by `shrink`.

    Returns (rows, columns, 3) uint8 RGB. A sequential JPEG is stored from the top down, so decoding can stop
    where a crop ends: the height in the header is lowered, and the decoder ends there. Returns None where the
    file may be damaged; decode it whole.
    """
    # Two more rows of the result: the decoder smooths the colours of neighbouring rows into each other.
    height = min(header.height, bottom + 2 * shrink)
    shortened = bytearray(encoded)
    struct.pack_into(">H", shortened, header.height_at, height)
    rows, columns = -(-height // shrink), -(-header.width // shrink)
    pixels = np.empty((rows, columns, 3), np.uint8)
    try:
        simplejpeg.decode_jpeg(
            shortened, "RGB", min_height=rows, min_width=columns, min_factor=shrink, buffer=pixels
        )
    except ValueError as e:
        # The rows below the new height are extraneous now: libjpeg's one complaint about a file in order. It
        # comes after all pixels are in the buffer.
        if height == header.height or EXTRANEOUS_BYTES not in str(e):
            return None
    return pixels
