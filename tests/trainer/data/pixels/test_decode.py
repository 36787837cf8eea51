"""Every kind of image becomes the pixels that a user sees, or a ValueError that says why."""

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from tests.trainer.data.pixels.pictures import (
    HEIGHT,
    PLAIN,
    WIDTH,
    by_hand,
    data,
    encoded,
    jpeg,
    picture,
)
from trainer.data.pixels.decode import decode
from trainer.data.pixels.transform import eval_image, train_image

pytestmark = pytest.mark.filterwarnings(
    "ignore:::PIL"
)  # pytest forgets the filter that is set once a process


def grey() -> np.ndarray:
    return picture()[..., 0]


def three(channel: np.ndarray) -> np.ndarray:
    return np.stack([channel] * 3, axis=-1)


def png_of_16_bits() -> bytes:
    rows = b"".join(b"\0" + row.tobytes() for row in (grey().astype(">u2") * 257))
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def cmyk() -> Image.Image:
    """Inks whose colour is `picture`: no black, and the complement of each channel."""
    return Image.fromarray(np.dstack([255 - picture(), np.zeros_like(grey())]), "CMYK")


def without_adobe(content: bytes) -> bytes:
    at = content.index(b"\xff\xee")
    return content[:at] + content[at + 2 + int.from_bytes(content[at + 2 : at + 4], "big") :]


def palette_with_transparency() -> bytes:
    image = Image.fromarray(picture()).quantize(256)
    return encoded(image, "PNG", transparency=bytes(range(256)))


KINDS: dict[str, tuple[Callable[[], bytes], Callable[[], np.ndarray], float]] = {
    "JPEG": (jpeg, picture, 2),
    "progressive JPEG": (lambda: jpeg(progressive=True), picture, 2),
    "JPEG of RGB": (lambda: encoded(picture(), "JPEG", quality=95, keep_rgb=True), picture, 2),
    "JPEG with restart markers": (lambda: jpeg(restart_marker_blocks=3), picture, 2),
    "grey JPEG": (lambda: encoded(grey(), "JPEG", quality=95), lambda: three(grey()), 2),
    "CMYK JPEG of Adobe": (lambda: encoded(cmyk(), "JPEG", quality=95), picture, 2),
    "CMYK JPEG without Adobe": (
        lambda: without_adobe(encoded(Image.fromarray(255 - np.asarray(cmyk()), "CMYK"), "JPEG", quality=95)),
        picture,
        2,
    ),
    "YCCK JPEG": (
        lambda: simplejpeg.encode_jpeg(np.ascontiguousarray(255 - np.asarray(cmyk())), 95, "CMYK"),
        picture,
        2,
    ),
    "PNG": (lambda: encoded(picture(), "PNG"), picture, 0),
    "grey PNG": (lambda: encoded(grey(), "PNG"), lambda: three(grey()), 0),
    "PNG of 16 bits": (png_of_16_bits, lambda: three(grey()), 0),
    "black and white PNG": (
        lambda: encoded(Image.fromarray(grey() > 99), "PNG"),
        lambda: three((grey() > 99) * np.uint8(255)),
        0,
    ),
    "PNG with alpha": (
        lambda: encoded(np.dstack([picture(), grey()]), "PNG"),
        picture,
        0,
    ),
    "palette PNG with alpha": (
        palette_with_transparency,
        lambda: np.asarray(Image.fromarray(picture()).quantize(256).convert("RGB")),
        0,
    ),
    "WebP": (lambda: encoded(picture(), "WEBP", lossless=True), picture, 0),
    "GIF": (
        lambda: encoded(Image.fromarray(picture()).quantize(256), "GIF"),
        lambda: np.asarray(Image.fromarray(picture()).quantize(256).convert("RGB")),
        0,
    ),
    "BMP": (lambda: encoded(picture(), "BMP"), picture, 0),
    "TIFF": (lambda: encoded(picture(), "TIFF", compression="tiff_lzw"), picture, 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_decodes_to_the_picture(kind: str) -> None:
    make, expected, tolerance = KINDS[kind]
    pixels = decode(make())
    assert (pixels.dtype, pixels.shape) == (np.uint8, (HEIGHT, WIDTH, 3))
    assert np.abs(pixels.astype(int) - expected()).mean() <= tolerance


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_upright_whatever_its_orientation(format: str, orientation: int) -> None:  # noqa: A002
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = encoded(picture(), format, quality=95, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(stored))).convert("RGB"))
    assert expected.shape[:2] == ((HEIGHT, WIDTH) if orientation < 5 else (WIDTH, HEIGHT))
    np.testing.assert_array_equal(decode(stored), expected)
    crop = train_image(stored, seed=0, position=5, data=data(64), augment=PLAIN)
    np.testing.assert_array_equal(crop, by_hand(expected, 5, 64))


def test_the_orientation_outlasts_the_xmp_that_follows_it() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = jpeg(exif=exif, xmp=b"<x/>")
    assert stored.index(b"Exif") < stored.index(b"ns.adobe.com")
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(stored)))
    assert np.array_equal(decode(stored), np.asarray(expected))


def test_bytes_may_come_in_any_buffer() -> None:
    content = jpeg()
    for same in (bytearray(content), memoryview(content), np.frombuffer(content, np.uint8)):
        np.testing.assert_array_equal(decode(same), decode(content))
        np.testing.assert_array_equal(
            train_image(same, seed=1, position=2, data=data(32), augment=PLAIN),
            train_image(content, seed=1, position=2, data=data(32), augment=PLAIN),
        )


def bomb_png() -> bytes:
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return encoded(picture(), "PNG").replace(
        b"IHDR" + struct.pack(">II", WIDTH, HEIGHT), b"IHDR" + header[:8]
    )[:29] + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + encoded(picture(), "PNG")[33:]  # fmt: skip


def bomb_jpeg() -> bytes:
    content = bytearray(jpeg())
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    return bytes(content)


BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "empty"),
    "no image": (lambda: b"<!DOCTYPE html><html>404</html>", "no image"),
    "two bytes of a JPEG": (lambda: jpeg()[:2], "no image"),
    "header of a JPEG alone": (lambda: jpeg()[:300], "cut off|no image"),
    "JPEG cut off": (lambda: jpeg()[:-400], "cut off"),
    "JPEG cut off by its last bytes": (lambda: jpeg()[:-10], "cut off"),
    "progressive JPEG cut off": (lambda: jpeg(progressive=True)[:-400], "cut off"),
    "PNG cut off": (lambda: encoded(picture(), "PNG")[:-400], "decode"),
    "WebP cut off": (lambda: encoded(picture(), "WEBP")[:-400], "decode|no image"),
    "PNG of 400 million pixels": (bomb_png, "bomb"),
    "JPEG of 3600 million pixels": (bomb_jpeg, "bomb"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_broken_is_a_value_error_that_says_why(kind: str) -> None:
    make, reason = BROKEN[kind]
    for use in (
        decode,
        lambda content: eval_image(content, data=data(32)),
        lambda content: train_image(content, seed=0, position=0, data=data(8), augment=PLAIN),
    ):
        with pytest.raises(ValueError, match=reason):
            use(make())


def test_damage_at_any_byte_is_at_most_a_value_error() -> None:
    rng = np.random.default_rng(0)
    formats = [encoded(picture(24, 40), name) for name in ("PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG")]
    formats += [png_of_16_bits(), encoded(cmyk(), "JPEG"), palette_with_transparency()]
    raised = 0
    for content in formats:
        for _ in range(60):
            damaged = np.frombuffer(content, np.uint8).copy()
            damaged[rng.integers(min(len(damaged), 500))] = rng.integers(256)
            try:
                pixels = decode(damaged)
                assert (pixels.dtype, pixels.ndim) == (np.uint8, 3)
                image = train_image(damaged, seed=0, position=1, data=data(8), augment=PLAIN)
                assert image.shape == (8, 8, 3)
            except ValueError:
                raised += 1
    assert raised > 100


def test_bytes_after_the_last_block_of_a_jpeg_do_no_harm() -> None:
    content = jpeg()
    padded = content[:-2] + bytes(9) + content[-2:]
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(padded, "RGB")
    np.testing.assert_array_equal(decode(padded), decode(content))


def test_no_warning_reaches_the_user() -> None:
    code = """
import io, sys, warnings
from PIL import Image
from trainer.data.pixels.decode import decode
image = Image.new("P", (9500, 9500))  # Pillow warns of its size, and of its transparency
buffer = io.BytesIO(); image.save(buffer, "PNG", transparency=bytes(9))
print(decode(buffer.getvalue()).shape)
"""
    ran = subprocess.run(
        [sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True
    )
    assert (ran.stdout.strip(), ran.stderr) == ("(9500, 9500, 3)", "")
