"""Each augmentation on the devices does what its paper says, to the same bits on every mesh, or is not there."""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from scipy import stats

from configs.schema import RunConfig
from tests.trainer.small import config_of
from trainer.augment import _symmetric_beta, augment, normalise
from trainer.mesh import batch_sharding, make_mesh

BATCH, SIZE, CLASSES = 16, 12, 10
COLLECTIVE = re.compile(
    r" (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
EVERYTHING = ("augment.flip=true", "augment.color_jitter=[0.4, 0.4, 0.4]",
              "augment.erasing=0.5", "augment.mixup=0.2", "augment.cutmix=1.0")  # fmt: skip
UNIT = ("data.mean=[0, 0, 0]", "data.std=[1, 1, 1]", "train.label_smoothing=0")
"""Images stay in [0, 1], labels one-hot, so that what is left is the augmentation."""


def pixels(batch: int = BATCH, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)


def labels(batch: int = BATCH) -> np.ndarray:
    return (np.arange(batch) % CLASSES).astype(np.int32)


def augmented(
    *overrides: str, images: np.ndarray | None = None, targets: np.ndarray | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    images = pixels() if images is None else images
    targets = labels(len(images)) if targets is None else targets
    config = config_of(*UNIT, *overrides)
    step = jax.jit(lambda i, t, k: augment(i, t, k, config))
    out = step(jnp.asarray(images), jnp.asarray(targets), jax.random.key(seed))
    return np.asarray(out[0]), np.asarray(out[1])


def test_images_are_normalised_and_targets_smoothed() -> None:
    config = config_of("data.mean=[0.1, 0.2, 0.3]", "data.std=[0.4, 0.5, 0.6]", "train.label_smoothing=0.1")
    images, targets = augment(jnp.asarray(pixels()), jnp.asarray(labels()), jax.random.key(0), config)
    expected = (pixels() / 255 - [0.1, 0.2, 0.3]) / [0.4, 0.5, 0.6]
    np.testing.assert_allclose(images, expected, atol=1e-6)
    np.testing.assert_array_equal(images, normalise(jnp.asarray(pixels()), config.data))
    np.testing.assert_allclose(targets, 0.9 * np.eye(CLASSES)[labels()] + 0.01, atol=1e-6)


def test_flip_mirrors_about_half_and_changes_from_step_to_step() -> None:
    images = pixels(256, 4)
    mirrored = []
    for seed in (0, 1):
        flipped, _ = augmented("augment.flip=true", images=images, seed=seed)
        flipped = np.rint(255 * flipped)
        is_mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
        assert (is_mirrored | (flipped == images).all((1, 2, 3))).all()
        assert 96 < is_mirrored.sum() < 160
        mirrored.append(is_mirrored)
    assert (mirrored[0] != mirrored[1]).any()


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colours_are_blended_by_one_factor_an_image(name: str) -> None:
    jitter = [0.2 * (name == each) for each in ("brightness", "contrast", "saturation")]
    images = (pixels(64) // 2 + 60).astype(np.uint8)  # clipping is left to another test
    before = images / 255
    grey = (before @ [0.2989, 0.587, 0.114])[..., None]
    shade = {"brightness": 0 * grey, "contrast": grey.mean((1, 2), keepdims=True), "saturation": grey}[name]
    after, _ = augmented(f"augment.color_jitter={jitter}", images=images)
    away = before - shade  # after = shade + factor × away
    factor = ((after - shade) * away).sum((1, 2, 3), keepdims=True) / (away**2).sum((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(after, shade + factor * away, atol=2e-5)
    assert 0.8 <= factor.min() < 0.83
    assert 1.17 < factor.max() <= 1.2


def test_colours_stay_within_their_range() -> None:
    after, _ = augmented("augment.color_jitter=[0.9, 0.9, 0.9]")
    assert (after.min(), after.max()) == (0, 1)


def rectangle(mask: np.ndarray) -> tuple[int, int]:
    """Height and width of the one rectangle that `mask` (height, width) holds."""
    height, width = mask.any(1).sum(), mask.any(0).sum()
    assert mask.sum() == height * width
    assert np.diff(np.flatnonzero(mask.any(1))).max(initial=1) == 1
    assert np.diff(np.flatnonzero(mask.any(0))).max(initial=1) == 1
    return int(height), int(width)


def test_erasing_sets_a_rectangle_of_a_share_of_the_images_to_the_mean() -> None:
    images = np.full((400, 40, 40, 3), 255, np.uint8)
    after, targets = augmented("augment.erasing=0.3", "data.mean=[0.5, 0.5, 0.5]", images=images)
    erased = (after == 0).all(-1)
    np.testing.assert_array_equal(after[~erased], 0.5)
    touched = erased.any((1, 2))
    assert 85 < touched.sum() < 155  # of 120
    boxes = np.array([rectangle(mask) for mask in erased[touched]])
    areas, ratios = boxes.prod(1) / 1600, boxes[:, 0] / boxes[:, 1]
    assert 0.015 < areas.min() < 0.06
    assert 0.27 < areas.max() < 0.35
    assert 0.25 < ratios.min() < 0.45
    assert 2.2 < ratios.max() < 3.8
    np.testing.assert_array_equal(targets, np.eye(CLASSES)[labels(400)])


def test_erasing_at_probability_1_spares_no_image() -> None:
    after, _ = augmented("augment.erasing=1.0", images=np.full((64, 40, 40, 3), 255, np.uint8))
    assert (after == 0).any((1, 2, 3)).all()


def swapped(x: np.ndarray) -> np.ndarray:
    """Each row's partner: rows 2k and 2k + 1 exchanged."""
    return x.reshape(len(x) // 2, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)


def own_share(targets: np.ndarray) -> np.ndarray:
    return targets[np.arange(len(targets)), labels(len(targets))]


def test_mixup_blends_both_rows_of_a_pair_and_their_labels_by_one_lambda() -> None:
    after, targets = augmented("augment.mixup=0.4")
    lam = own_share(targets)
    np.testing.assert_array_equal(lam[::2], lam[1::2])
    assert len(set(lam)) == BATCH // 2
    before, lam = pixels() / 255, lam[:, None]
    expected = lam[..., None, None] * before + (1 - lam[..., None, None]) * swapped(before)
    np.testing.assert_allclose(after, expected, atol=1e-6)
    hot = np.eye(CLASSES)[labels()]
    np.testing.assert_allclose(targets, lam * hot + (1 - lam) * swapped(hot), atol=1e-6)


def test_cutmix_pastes_a_rectangle_and_the_label_counts_its_area() -> None:
    images = np.zeros((400, 20, 20, 3), np.uint8)
    images[1::2] = 255
    after, targets = augmented("augment.cutmix=1.0", images=images)
    assert set(np.unique(after)) == {0, 1}
    pasted = after[..., 0] != images[..., 0] / 255
    np.testing.assert_array_equal(pasted[::2], pasted[1::2])
    sides = [rectangle(mask) for mask in pasted]
    assert any(h != w for h, w in sides)  # some reach over the edge, and are counted as far as they go
    np.testing.assert_allclose(1 - own_share(targets), pasted.mean((1, 2)), atol=1e-6)
    assert 0.1 < pasted.mean() < 0.5


def test_with_both_each_pair_takes_one_of_the_two() -> None:
    images = np.zeros((200, 8, 8, 3), np.uint8)
    images[1::2] = 255
    after, targets = augmented("augment.mixup=1.0", "augment.cutmix=1.0", images=images)
    is_mixup = np.array([len(np.unique(image)) == 1 and 0 < image.flat[0] < 1 for image in after])
    is_cut = np.isin(after, (0, 1)).all((1, 2, 3))
    assert (is_mixup ^ is_cut).all()
    assert 70 < is_cut.sum() < 130
    np.testing.assert_allclose(
        own_share(targets), 1 - np.abs(after - images / 255).mean((1, 2, 3)), atol=1e-6
    )


@pytest.mark.parametrize("mix", ["augment.mixup=1.0", "augment.cutmix=1.0"])
def test_a_masked_row_has_no_target_and_is_mixed_into_none(mix: str) -> None:
    masked = labels()
    masked[[3, 8, 10, 11]] = -1
    after, targets = augmented(mix, targets=masked, seed=1)
    assert (targets[masked < 0] == 0).all()
    partners = [2, 9]
    np.testing.assert_allclose(after[partners], pixels()[partners] / 255, atol=1e-6)
    np.testing.assert_array_equal(targets[partners], np.eye(CLASSES)[masked[partners]])
    whole = np.setdiff1d(np.arange(BATCH), [2, 3, 8, 9, 10, 11])
    mixed, expected = augmented(mix, seed=1)
    np.testing.assert_array_equal(after[whole], mixed[whole])
    np.testing.assert_array_equal(targets[whole], expected[whole])
    assert (expected[whole].max(1) < 1).any()


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0, 8.0])
def test_lambdas_are_beta_distributed(alpha: float) -> None:
    lam = np.asarray(_symmetric_beta(jax.random.key(1), alpha, 4000), np.float64)
    assert 0 <= lam.min() <= lam.max() <= 1
    # Below 0.4 most lie so near 0 and 1 that float32 rounds them: compared a step within.
    inner = np.linspace(0.001, 0.999, 400)
    ours = np.searchsorted(np.sort(lam), inner) / len(lam)
    assert np.abs(ours - stats.beta(alpha, alpha).cdf(inner)).max() < 0.03


def compiled(
    config: RunConfig, shape: tuple[int, int] | None
) -> tuple[jax.stages.Compiled, Sequence[jax.Array]]:
    """The augmentation alone, for a batch over a mesh or on one device."""
    sharding = batch_sharding(make_mesh(*shape)) if shape else SingleDeviceSharding(jax.devices()[0])
    targets = labels()
    targets[5] = -1
    inputs = [jax.device_put(x, sharding) for x in (pixels(), targets)]
    step = jax.jit(
        lambda images, targets: augment(images, targets, jax.random.key(3), config), out_shardings=sharding
    )
    return step.lower(*inputs).compile(), inputs


def test_every_mesh_computes_the_same_bits_and_no_device_asks_another() -> None:
    config, outputs = config_of(*EVERYTHING), []
    for shape in (None, (4, 1), (2, 2)):
        program, inputs = compiled(config, shape)
        assert not COLLECTIVE.search(program.as_text())
        outputs.append([np.asarray(x) for x in program(*inputs)])
    assert config.train.label_smoothing
    np.testing.assert_allclose(outputs[0][1].sum(1), np.arange(BATCH) != 5, atol=1e-6)
    for images, targets in outputs[1:]:
        np.testing.assert_array_equal(images, outputs[0][0])
        np.testing.assert_array_equal(targets, outputs[0][1])


def test_what_is_off_is_not_in_the_program() -> None:
    def operations(*overrides: str) -> str:
        config = config_of(*overrides)
        return jax.jit(lambda i, t, k: augment(i, t, k, config)).lower(
            jax.ShapeDtypeStruct((BATCH, SIZE, SIZE, 3), jnp.uint8),
            jax.ShapeDtypeStruct((BATCH,), jnp.int32),
            jax.random.key(0),
        ).compile().as_text()  # fmt: skip

    off = operations("augment.flip=false")
    assert not re.search(r"rng|threefry|shift|reverse|select.*u8", off)  # nothing is drawn
    for setting in EVERYTHING:
        assert re.search(r"shift", operations("augment.flip=false", setting)), setting
