"""Every kind of image becomes the pixels that a user sees, or a ValueError that says why; crops are torchvision's."""

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps
from scipy import stats

from configs.schema import AugmentConfig, DataConfig
from trainer.data import images
from trainer.data.images import center_crop, crop_box, decode, eval_image, sample_rng, train_image

pytestmark = pytest.mark.filterwarnings(
    "ignore:::PIL"
)  # pytest forgets the filter that is set once a process

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


def test_damage_within_the_crop_is_found_though_what_follows_is_not_read() -> None:
    content = bytearray(jpeg())
    at = content.index(b"\xff\xda") + 100
    content[at : at + 40] = b"\xff\x00" * 20  # ones in a row are no code
    settings = AugmentConfig(crop_scale=(0.3, 0.9))
    with pytest.raises(ValueError, match="damaged"):
        train_image(content, seed=0, position=0, data=data(32), augment=settings)


def test_no_warning_reaches_the_user() -> None:
    code = """
import io, sys, warnings
from PIL import Image
from trainer.data.images import decode
image = Image.new("P", (9500, 9500))  # Pillow warns of its size, and of its transparency
buffer = io.BytesIO(); image.save(buffer, "PNG", transparency=bytes(9))
print(decode(buffer.getvalue()).shape)
"""
    ran = subprocess.run(
        [sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True
    )
    assert (ran.stdout.strip(), ran.stderr) == ("(9500, 9500, 3)", "")


# Crops.


def data(image_size: int, eval_resize: int | None = None) -> DataConfig:
    return DataConfig(source="digits", image_size=image_size, eval_resize=eval_resize)


def by_hand(pixels: np.ndarray, position: int, size: int, augment: AugmentConfig = PLAIN) -> np.ndarray:
    """The crop of a picture that has been decoded whole."""
    box = crop_box(*pixels.shape[:2], sample_rng(0, position), augment)
    part = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
    if augment.antialias:
        return np.asarray(Image.fromarray(part).resize((size, size), Image.Resampling.BILINEAR))
    return cv2.resize(part, (size, size), interpolation=cv2.INTER_LINEAR)


@pytest.mark.parametrize("augment", [PLAIN, ANTIALIASED], ids=["plain", "antialiased"])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_a_jpeg_decoded_no_further_than_the_crop_gives_the_same_crop(
    subsampling: str, augment: AugmentConfig
) -> None:
    content = jpeg(subsampling=subsampling)
    whole = decode(content)
    for position in range(60):
        crop = train_image(content, seed=0, position=position, data=data(64), augment=augment)
        np.testing.assert_array_equal(crop, by_hand(whole, position, 64, augment))


def test_a_large_jpeg_is_shrunk_while_decoding_which_is_closer_to_antialiasing() -> None:
    # Fine stripes, which a bilinear resize without antialiasing turns to coarse ones.
    image = np.where(np.arange(1300)[None, :, None] // 3 % 2, picture(900, 1300), 255 - picture(900, 1300))
    content = encoded(image, "JPEG", quality=95)
    whole = decode(content)
    for position in range(10):
        crop, plain, best = (
            x.astype(int)
            for x in (
                train_image(content, seed=0, position=position, data=data(32), augment=PLAIN),
                by_hand(whole, position, 32),
                by_hand(whole, position, 32, ANTIALIASED),
            )
        )
        assert np.abs(crop - best).mean() < 0.5 * np.abs(plain - best).mean()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 1000), (1000, 1), (7, 3), (375, 500)])
def test_crops_lie_inside(height: int, width: int) -> None:
    for scale in ((0.08, 1.0), (1.0, 1.0), (1e-6, 1e-6)):
        augment = AugmentConfig(crop_scale=scale)
        for position in range(300):
            top, left, h, w = crop_box(height, width, sample_rng(0, position), augment)
            assert 0 <= top <= top + h <= height
            assert 0 <= left <= left + w <= width
            assert min(h, w) >= 1
    image = train_image(
        encoded(picture(height, width), "PNG"), seed=0, position=0, data=data(16), augment=PLAIN
    )
    assert image.shape == (16, 16, 3)
    assert eval_image(encoded(picture(height, width), "PNG"), data=data(16)).shape == (16, 16, 3)


def reference_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """RandomResizedCrop.get_params, as torchvision's documentation and paper describe it."""
    for _ in range(10):
        area = rng.uniform(0.08, 1) * height * width
        ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if w <= width and h <= height:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    if width < 3 / 4 * height:
        h, w = round(width / (3 / 4)), width
    elif width > 4 / 3 * height:
        h, w = height, round(height * (4 / 3))
    else:
        h, w = height, width
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (100, 700)])
def test_boxes_are_distributed_as_torchvisions(height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    theirs = np.array([reference_box(height, width, rng) for _ in range(4000)])
    ours = np.array([crop_box(height, width, sample_rng(0, i), PLAIN) for i in range(4000)])
    for a, b in zip(ours.T, theirs.T, strict=True):
        assert stats.ks_2samp(a, b).pvalue > 0.001
    areas, ratios = ([x[:, 2] * x[:, 3], x[:, 3] / x[:, 2]] for x in (ours, theirs))
    assert stats.ks_2samp(areas[0], ratios[0]).pvalue > 0.001
    assert stats.ks_2samp(areas[1], ratios[1]).pvalue > 0.001


def test_an_image_that_no_box_fits_is_cropped_at_its_centre() -> None:
    wide = [crop_box(10, 1000, sample_rng(0, i), AugmentConfig(crop_scale=(1, 1))) for i in range(20)]
    assert set(wide) == {(0, 493, 10, 13)}
    tall = [crop_box(1000, 10, sample_rng(0, i), AugmentConfig(crop_scale=(1, 1))) for i in range(20)]
    assert set(tall) == {(493, 0, 13, 10)}


@pytest.mark.parametrize(
    ("height", "width", "resize", "size"),
    [(375, 500, 256, 224), (500, 333, 256, 224), (90, 130, 73, 64), (61, 47, 100, 81), (40, 300, 32, 31)],
)
def test_the_centre_crop_is_that_of_the_whole_image_resized(
    height: int, width: int, resize: int, size: int
) -> None:
    image = picture(height, width)
    short, long = min(height, width), max(height, width)
    scaled = (resize, int(resize * long / short))
    whole = Image.fromarray(image).resize(
        scaled if width < height else scaled[::-1], Image.Resampling.BILINEAR
    )
    left, top = (round((side - size) / 2.0) for side in whole.size)
    expected = np.asarray(whole.crop((left, top, left + size, top + size))).astype(int)
    got = center_crop(image, resize, size)
    assert np.abs(got - expected).max() <= 1
    assert (got != expected).mean() < 0.01


def test_evaluation_keeps_224_of_256_unless_told() -> None:
    content = encoded(picture(300, 400), "PNG")
    for settings, resize in ((data(224), 256), (data(224, eval_resize=232), 232)):
        expected = center_crop(picture(300, 400), resize, 224)
        np.testing.assert_array_equal(eval_image(content, data=settings), expected)


def test_draws_depend_on_seed_and_position_alone() -> None:
    draws = {(s, p): sample_rng(s, p).random() for s in (0, 1, 2**32 - 1) for p in (0, 1, 2, 2**40)}
    assert len(set(draws.values())) == len(draws)
    assert draws == {(s, p): sample_rng(s, p).random() for s, p in draws}
    crops = {
        position: train_image(jpeg(), seed=3, position=position, data=data(32), augment=PLAIN).tobytes()
        for position in (0, 1, 0)
    }
    assert crops[0] != crops[1]
    assert crops[0] == train_image(jpeg(), seed=3, position=0, data=data(32), augment=PLAIN).tobytes()


def test_randaugment_follows_the_crop() -> None:
    plain, changed = (
        train_image(
            jpeg(),
            seed=0,
            position=0,
            data=data(32),
            augment=AugmentConfig(randaugment=(ops, 30)),
        )
        for ops in (0, 6)
    )
    assert changed.shape == plain.shape == (32, 32, 3)
    assert (changed != plain).any()
    draw = sample_rng(0, 0)
    crop_box(HEIGHT, WIDTH, draw, PLAIN)
    settings = AugmentConfig(randaugment=(6, 30))
    np.testing.assert_array_equal(changed, images.randaugment(plain, draw, settings))
