"""RandAugment's operations against plain numpy, at torchvision's magnitudes, drawn by the sample's generator."""

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from configs.schema import AugmentConfig
from trainer.data.pixels.randaugment import SIGNED, UNSIGNED, randaugment
from trainer.data.pixels.transform import sample_rng

SIZE = 40
IMAGE = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
DULL = (IMAGE // 4 + 50).astype(np.uint8)
Y, X = np.mgrid[:SIZE, :SIZE]


def applied(name: str, magnitude: int, sign: int = 1, image: np.ndarray = IMAGE) -> np.ndarray:
    operation = {**SIGNED, **UNSIGNED}[name]
    return np.asarray(operation(Image.fromarray(image), sign * magnitude / 30))


def sampled(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """IMAGE at the pixel that holds (x, y), black outside."""
    column, row = np.floor(x).astype(int), np.floor(y).astype(int)
    inside = (column >= 0) & (column < SIZE) & (row >= 0) & (row < SIZE)
    return np.where(inside[..., None], IMAGE[row.clip(0, SIZE - 1), column.clip(0, SIZE - 1)], 0)


def rotated(degrees: float) -> np.ndarray:
    """Counter-clockwise about the centre."""
    turn, centre = np.deg2rad(degrees), SIZE / 2
    x, y = X + 0.5 - centre, Y + 0.5 - centre
    return sampled(x * np.cos(turn) - y * np.sin(turn) + centre, x * np.sin(turn) + y * np.cos(turn) + centre)


def moved(pixels: float) -> int:
    return int(150 / 331 * SIZE * pixels)


GEOMETRY: dict[str, Callable[[float], np.ndarray]] = {
    "shear_x": lambda s: sampled(X + 0.5 + 0.3 * s * (Y + 0.5), Y + 0.5),
    "shear_y": lambda s: sampled(X + 0.5, Y + 0.5 + 0.3 * s * (X + 0.5)),
    "translate_x": lambda s: sampled(X - moved(s), Y),
    "translate_y": lambda s: sampled(X, Y - moved(s)),
    "rotate": lambda s: rotated(30 * s),
}


@pytest.mark.parametrize("name", GEOMETRY)
@pytest.mark.parametrize("magnitude", [9, 30])
@pytest.mark.parametrize("sign", [1, -1])
def test_geometry(name: str, magnitude: int, sign: int) -> None:
    expected = GEOMETRY[name](sign * magnitude / 30)
    differs = (applied(name, magnitude, sign) != expected).any(-1).mean()
    assert differs < 0.02  # Pillow's fixed point takes the neighbour on an edge between two pixels
    assert (expected != IMAGE).any()


def grey(image: np.ndarray) -> np.ndarray:
    return (image @ np.array([0.299, 0.587, 0.114]))[..., None]


SHADES: dict[str, Callable[[], np.ndarray]] = {
    "brightness": lambda: np.zeros((1, 1, 1)),
    "color": lambda: grey(IMAGE),
    "contrast": lambda: grey(IMAGE).mean(),
}


@pytest.mark.parametrize("name", SHADES)
@pytest.mark.parametrize("sign", [1, -1])
def test_colours_are_blended_with_a_shade(name: str, sign: int) -> None:
    factor = 1 + sign * 0.9 * 9 / 30
    expected = (factor * IMAGE + (1 - factor) * SHADES[name]()).clip(0, 255)
    assert np.abs(applied(name, 9, sign) - expected).max() <= 2


def test_sharpness_goes_both_ways() -> None:
    def roughness(image: np.ndarray) -> float:
        return float(np.abs(np.diff(image.astype(int), axis=0)).mean())

    soft = (IMAGE // 8 + 100).astype(np.uint8)
    ascending = [applied("sharpness", 20, sign, soft) for sign in (-1, 0, 1)]
    assert roughness(ascending[0]) < roughness(ascending[1]) < roughness(ascending[2])


@pytest.mark.parametrize(("magnitude", "bits"), [(0, 8), (9, 7), (15, 6), (30, 4)])
def test_posterize_keeps_8_to_4_bits(magnitude: int, bits: int) -> None:
    np.testing.assert_array_equal(applied("posterize", magnitude), IMAGE & (256 - 2 ** (8 - bits)))


@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_solarize_inverts_from_a_threshold_on(magnitude: int) -> None:
    threshold = np.linspace(255, 0, 31)[magnitude]
    np.testing.assert_array_equal(
        applied("solarize", magnitude), np.where(threshold > IMAGE, IMAGE, 255 - IMAGE)
    )


def test_autocontrast_and_equalize_spread_the_values() -> None:
    for name in ("autocontrast", "equalize"):
        spread = applied(name, 0, image=DULL)
        assert spread.min() == 0
        assert spread.max() >= 254
    np.testing.assert_array_equal(applied("identity", 30), IMAGE)


def test_operations_are_drawn_evenly_and_signed_half_of_the_time() -> None:
    one = AugmentConfig(randaugment=(1, 30))
    outcomes = {}
    for names, signs in ((SIGNED, (1, -1)), (UNSIGNED, (1,))):
        for name in names:
            for sign in signs:
                outcomes[applied(name, 30, sign, DULL).tobytes()] = (name, sign)
    assert len(outcomes) == 2 * 9 + 5
    drawn = [outcomes[randaugment(DULL, sample_rng(0, i), one).tobytes()] for i in range(2800)]
    for name in {**SIGNED, **UNSIGNED}:
        assert 140 < sum(d[0] == name for d in drawn) < 260  # of 200
    signed = [sign for name, sign in drawn if name in SIGNED]
    assert abs(np.mean(signed)) < 0.08


def test_operations_follow_one_another_and_the_generator() -> None:
    three = AugmentConfig(randaugment=(3, 20))
    np.testing.assert_array_equal(
        randaugment(IMAGE, sample_rng(1, 2), three), randaugment(IMAGE, sample_rng(1, 2), three)
    )
    one, draw, expected = three.model_copy(update={"randaugment": (1, 20)}), sample_rng(1, 2), IMAGE
    for _ in range(3):
        expected = randaugment(expected, draw, one)
    np.testing.assert_array_equal(randaugment(IMAGE, sample_rng(1, 2), three), expected)
