"""Augmentation on the devices, inside the step: from uint8 images and labels to floats and targets.

A row's draws depend on the step's key and on the row, never on the device that holds it. What mixes does so
within a pair of rows, 2k and 2k + 1: no device needs a row of another. What is off is not in the program.
"""

import math

import jax
import jax.numpy as jnp
import optax

from configs.schema import AugmentConfig, DataConfig, RunConfig

ERASED_AREA = (0.02, 0.33)
ERASED_RATIO = (0.3, 3.3)
ERASING_TRIES = 10


def augment(
    images: jax.Array, labels: jax.Array, key: jax.Array, config: RunConfig
) -> tuple[jax.Array, jax.Array]:
    """Augmented, normalised images and their targets, both float32.

    `images` is (batch, height, width, 3) uint8, `labels` (batch,) int32. Targets are (batch, num_classes): each
    row sums to 1, but that of a label -1 is 0, and such a row is mixed into no other.
    """
    settings = config.augment
    flip_key, jitter_key, erasing_key, mix_key = jax.random.split(key, 4)
    if settings.flip:
        mirrored = jax.random.bernoulli(flip_key, 0.5, (images.shape[0], 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    pixels = _color_jitter(images.astype(jnp.float32) / 255, settings, jitter_key)
    pixels = _standardise(pixels, config.data)
    if settings.erasing:
        pixels = jnp.where(
            _erasing_mask(pixels.shape[:3], settings.erasing, erasing_key)[..., None], 0, pixels
        )
    targets = optax.smooth_labels(
        jax.nn.one_hot(labels, config.model.num_classes), config.train.label_smoothing
    )
    targets = jnp.where(labels[:, None] >= 0, targets, 0)
    if settings.mixup or settings.cutmix:
        pixels, targets = _mix_pairs(pixels, targets, labels, settings, mix_key)
    return pixels, targets


def normalise(images: jax.Array, data: DataConfig) -> jax.Array:
    """float32 images of mean 0 and deviation 1, from uint8."""
    return _standardise(images.astype(jnp.float32) / 255, data)


def _standardise(pixels: jax.Array, data: DataConfig) -> jax.Array:
    mean, std = (jnp.array(c, jnp.float32) for c in (data.mean, data.std))
    return (pixels - mean) / std


def _color_jitter(pixels: jax.Array, settings: AugmentConfig, key: jax.Array) -> jax.Array:
    """torchvision's ColorJitter of images in [0, 1]: each blends with black, mean grey or grey, in this order."""
    spreads = dict(zip(("black", "mean", "grey"), settings.color_jitter, strict=True))
    shades = {"black": jnp.zeros_like, "mean": lambda x: _exact_mean(_grey(x)), "grey": _grey}
    for (name, spread), draw_key in zip(spreads.items(), jax.random.split(key, len(spreads)), strict=True):
        if not spread:
            continue
        shape = (len(pixels), 1, 1, 1)
        factor = jax.random.uniform(draw_key, shape, minval=1 - spread, maxval=1 + spread)
        other = shades[name](pixels)
        pixels = jnp.clip(factor * pixels + (1 - factor) * other, 0, 1)
    return pixels


def _grey(pixels: jax.Array) -> jax.Array:
    """(batch, height, width, 1): luma (ITU-R BT.601), with torchvision's digits."""
    red, green, blue = jnp.split(pixels, 3, axis=-1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def _exact_mean(grey: jax.Array) -> jax.Array:
    """(batch, 1, 1, 1): the mean of each image, to the same bits however the compiler orders the sum."""
    size = grey.shape[1] * grey.shape[2]
    one = 2 ** (30 - size.bit_length())  # the finest unit of which int32 holds the sum
    return jnp.rint(grey * one).astype(jnp.int32).sum((1, 2), keepdims=True) / (one * size)


def _erasing_mask(shape: tuple[int, ...], probability: float, key: jax.Array) -> jax.Array:
    """(batch, height, width) bool: a rectangle of a share of the rows (Zhong et al. 2017), as torchvision draws it.

    The first of ten rectangles that fits, and where none does, none.
    """
    batch, height, width = shape
    draws = jax.random.uniform(key, (batch, 4 * ERASING_TRIES + 1))
    area, log_ratio, top, left = draws[:, 1:].reshape(batch, 4, ERASING_TRIES).swapaxes(0, 1)
    area = height * width * (ERASED_AREA[0] + area * (ERASED_AREA[1] - ERASED_AREA[0]))
    low, high = (math.log(r) for r in ERASED_RATIO)
    ratio = jnp.exp(low + log_ratio * (high - low))
    h, w = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
    fits = (h < height) & (w < width)
    top, left = jnp.floor(top * (height - h + 1)), jnp.floor(left * (width - w + 1))
    first = jnp.argmax(fits, axis=1)[:, None]
    box = [jnp.take_along_axis(x, first, 1)[:, 0] for x in (top, left, top + h, left + w)]
    erased = (draws[:, 0] < probability) & fits.any(1)
    return _rectangle_mask(box, height, width) & erased[:, None, None]


def _rectangle_mask(box: list[jax.Array], height: int, width: int) -> jax.Array:
    """(n, height, width) bool: the pixels from (top, left) to before (bottom, right), each (n,)."""
    top, left, bottom, right = (x[:, None, None] for x in box)
    row, column = jnp.arange(height)[:, None], jnp.arange(width)
    return (row >= top) & (row < bottom) & (column >= left) & (column < right)


def _mix_pairs(
    pixels: jax.Array, targets: jax.Array, labels: jax.Array, settings: AugmentConfig, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Both rows of each pair are blended with the other: mixup everywhere alike, CutMix within a rectangle."""
    batch, height, width, _ = pixels.shape
    choice_key, mixup_key, cutmix_key = jax.random.split(key, 3)
    pairs = batch // 2
    own = share = jnp.ones((pairs, 1, 1))  # weights of a row's own pixels, and of its own label
    if settings.mixup:
        own = share = _symmetric_beta(mixup_key, settings.mixup, pairs)[:, None, None]
    if settings.cutmix:
        kept = 1.0 - _cutmix_mask(pairs, height, width, settings.cutmix, cutmix_key)
        cuts = jax.random.bernoulli(choice_key, 0.5, (pairs, 1, 1)) if settings.mixup else True
        # The rectangle may reach over the edge: the label counts what was pasted.
        own, share = jnp.where(cuts, kept, own), jnp.where(cuts, kept.mean((1, 2), keepdims=True), share)
    both_count = (labels.reshape(pairs, 2) >= 0).all(1)[:, None, None]
    own, share = jnp.where(both_count, own, 1), jnp.where(both_count, share, 1)

    def blend(x: jax.Array, share: jax.Array) -> jax.Array:
        two = x.reshape(pairs, 2, *x.shape[1:])
        return (share * two + (1 - share) * two[:, ::-1]).reshape(x.shape)

    return blend(pixels, own[:, None, :, :, None]), blend(targets, share)


def _cutmix_mask(pairs: int, height: int, width: int, alpha: float, key: jax.Array) -> jax.Array:
    """(pairs, height, width) bool: CutMix's rectangle (Yun et al. 2019), about any pixel, cut off at the edge."""
    share_key, place_key = jax.random.split(key)
    side = jnp.sqrt(1 - _symmetric_beta(share_key, alpha, pairs))
    at = jnp.floor(jax.random.uniform(place_key, (pairs, 2)) * jnp.array([height, width]))
    half = jnp.floor(side[:, None] * jnp.array([height, width])) // 2
    (top, left), (bottom, right) = (at - half).T, (at + half).T
    return _rectangle_mask([top, left, bottom, right], height, width)


def _symmetric_beta(key: jax.Array, alpha: float, n: int) -> jax.Array:
    """(n,) draws of Beta(α, α) in closed form: Student's t by Bailey (1994), carried over to [0, 1].

    jax.random.beta rejects and tries again; over several devices each try waits for all of them.
    """
    u, v = jax.random.uniform(key, (n, 2)).T
    log_s, c = jnp.log(u) / alpha, jnp.cos(2 * jnp.pi * v)
    rest = -jnp.expm1(log_s)  # 1 − s
    x = (1 + c * jnp.sqrt(rest / (jnp.exp(log_s) + rest * c**2))) / 2
    return jnp.clip(x, 0, 1)  # rounding passes the ends
