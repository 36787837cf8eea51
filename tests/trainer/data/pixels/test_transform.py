"""The crops of training and of evaluation are torchvision's, and depend on seed and position alone."""

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from configs.schema import AugmentConfig
from tests.trainer.data.pixels.pictures import (
    ANTIALIASED,
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
from trainer.data.pixels.randaugment import randaugment
from trainer.data.pixels.transform import center_crop, eval_image, random_crop_box, sample_rng, train_image


def test_damage_within_the_crop_is_found_though_what_follows_is_not_read() -> None:
    content = bytearray(jpeg())
    at = content.index(b"\xff\xda") + 100
    content[at : at + 40] = b"\xff\x00" * 20  # ones in a row are no code
    settings = AugmentConfig(crop_scale=(0.3, 0.9))
    with pytest.raises(ValueError, match="damaged"):
        train_image(content, seed=0, position=0, data=data(32), augment=settings)


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
            top, left, h, w = random_crop_box(height, width, sample_rng(0, position), augment)
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
    ours = np.array([random_crop_box(height, width, sample_rng(0, i), PLAIN) for i in range(4000)])
    for a, b in zip(ours.T, theirs.T, strict=True):
        assert stats.ks_2samp(a, b).pvalue > 0.001
    areas, ratios = ([x[:, 2] * x[:, 3], x[:, 3] / x[:, 2]] for x in (ours, theirs))
    assert stats.ks_2samp(areas[0], ratios[0]).pvalue > 0.001
    assert stats.ks_2samp(areas[1], ratios[1]).pvalue > 0.001


def test_an_image_that_no_box_fits_is_cropped_at_its_centre() -> None:
    wide = [random_crop_box(10, 1000, sample_rng(0, i), AugmentConfig(crop_scale=(1, 1))) for i in range(20)]
    assert set(wide) == {(0, 493, 10, 13)}
    tall = [random_crop_box(1000, 10, sample_rng(0, i), AugmentConfig(crop_scale=(1, 1))) for i in range(20)]
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
    random_crop_box(HEIGHT, WIDTH, draw, PLAIN)
    settings = AugmentConfig(randaugment=(6, 30))
    np.testing.assert_array_equal(changed, randaugment(plain, draw, settings))
