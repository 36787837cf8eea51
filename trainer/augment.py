"""Augmentation on the devices, within the step: from uint8 images and labels to float32 images and targets.

The random draws of a row depend on the step's key and on the row, never on the device that holds the row.
Mixing happens within pairs of rows, 2k and 2k + 1, so no device needs a row of another. What the recipe turns
off is not part of the compiled program.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from configs.schema import AugmentConfig, DataConfig, RunConfig

ERASED_AREA = (0.02, 0.33)
"""Smallest and largest erased area, as a fraction of the image (Zhong et al. 2017, arXiv:1708.04896)."""
ERASED_RATIO = (0.3, 3.3)
"""Smallest and largest ratio of height to width of the erased rectangle."""
ERASING_TRIES = 10


def augment(
    images: jax.Array, labels: jax.Array, key: jax.Array, config: RunConfig
) -> tuple[jax.Array, jax.Array]:
    """Augment, normalise and label a batch as `config.augment` says.

    `images` is (batch, height, width, 3) uint8, `labels` (batch,) int32, `key` a typed PRNG key. Returns
    images of the same shape and targets (batch, num_classes), both float32. The targets of a row sum to 1,
    but for a label of -1 all are 0, and such a row is never mixed with another.
    """
    settings = config.augment
    # Always all four, so that turning one augmentation on leaves the draws of the others as they are.
    flip_key, jitter_key, erasing_key, mix_key = jax.random.split(key, 4)
    if settings.flip:
        # On uint8, which is a quarter of the bytes to move.
        mirrored = jax.random.bernoulli(flip_key, 0.5, (images.shape[0], 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    pixels = _color_jitter(images.astype(jnp.float32) / 255, settings, jitter_key)
    pixels = _standardise(pixels, config.data)
    # After standardising, when 0 is the mean colour.
    if settings.erasing:
        pixels = jnp.where(
            _erasing_mask(pixels.shape[:3], settings.erasing, erasing_key)[..., None], 0, pixels
        )
    # Smoothed before mixing, which is linear, so the order of the two makes no difference.
    targets = optax.smooth_labels(
        jax.nn.one_hot(labels, config.model.num_classes), config.train.label_smoothing
    )
    targets = jnp.where(labels[:, None] >= 0, targets, 0)
    if settings.mixup or settings.cutmix:
        pixels, targets = _mix_pairs(pixels, targets, labels, settings, mix_key)
    return pixels, targets


def normalise(images: jax.Array, data: DataConfig) -> jax.Array:
    """From uint8 images, (batch, height, width, 3), to float32 of mean 0 and standard deviation 1."""
    return _standardise(images.astype(jnp.float32) / 255, data)


def _standardise(pixels: jax.Array, data: DataConfig) -> jax.Array:
    mean, std = (jnp.array(c, jnp.float32) for c in (data.mean, data.std))
    return (pixels - mean) / std


def _color_jitter(pixels: jax.Array, settings: AugmentConfig, key: jax.Array) -> jax.Array:
    """torchvision's ColorJitter of images in [0, 1]: brightness, contrast, saturation, in this order.

    Each blends the image with another one: with black, with its mean grey, and with its grey version.
    """
    others: list[Callable[[jax.Array], jax.Array]] = [jnp.zeros_like, lambda x: _exact_mean(_grey(x)), _grey]
    for other, spread, draw_key in zip(others, settings.color_jitter, jax.random.split(key, 3), strict=True):
        if spread:
            shape = (len(pixels), 1, 1, 1)
            factor = jax.random.uniform(draw_key, shape, minval=1 - spread, maxval=1 + spread)
            pixels = jnp.clip(factor * pixels + (1 - factor) * other(pixels), 0, 1)
    return pixels


def _grey(pixels: jax.Array) -> jax.Array:
    """The luma of each pixel (ITU-R BT.601) with torchvision's rounded weights: (batch, height, width, 1)."""
    red, green, blue = jnp.split(pixels, 3, axis=-1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def _exact_mean(grey: jax.Array) -> jax.Array:
    """The mean of each image, (batch, 1, 1, 1), the same to the last bit on every mesh.

    A sum of floats depends on the order in which the compiler adds them, a sum of integers does not.
    """
    size = grey.shape[1] * grey.shape[2]
    one = 2 ** (30 - size.bit_length())  # the finest fixed point whose sum still fits into int32
    return jnp.rint(grey * one).astype(jnp.int32).sum((1, 2), keepdims=True) / (one * size)


def _erasing_mask(shape: tuple[int, ...], probability: float, key: jax.Array) -> jax.Array:
    """Random erasing (Zhong et al. 2017) as torchvision draws it: (batch, height, width) bool.

    A row is chosen with `probability`. Of ten random rectangles the first that fits into the image is erased;
    if none fits, nothing is.
    """
    batch, height, width = shape
    # All ten tries are drawn and the first that fits is selected, because a compiled program has no early
    # end.
    draws = jax.random.uniform(key, (batch, 4 * ERASING_TRIES + 1))
    area, log_ratio, top, left = draws[:, 1:].reshape(batch, 4, ERASING_TRIES).swapaxes(0, 1)
    area = height * width * (ERASED_AREA[0] + area * (ERASED_AREA[1] - ERASED_AREA[0]))
    low, high = (math.log(r) for r in ERASED_RATIO)
    ratio = jnp.exp(low + log_ratio * (high - low))
    h, w = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
    fits = (h < height) & (w < width)
    top, left = jnp.floor(top * (height - h + 1)), jnp.floor(left * (width - w + 1))
    # The argmax of booleans is the first true one.
    first = jnp.argmax(fits, axis=1)[:, None]
    box = [jnp.take_along_axis(x, first, 1)[:, 0] for x in (top, left, top + h, left + w)]
    erased = (draws[:, 0] < probability) & fits.any(1)
    return _rectangle_mask(box, height, width) & erased[:, None, None]


def _rectangle_mask(box: list[jax.Array], height: int, width: int) -> jax.Array:
    """(n, height, width) bool, true from (top, left) to just before (bottom, right), each (n,)."""
    top, left, bottom, right = (x[:, None, None] for x in box)
    row, column = jnp.arange(height)[:, None], jnp.arange(width)
    return (row >= top) & (row < bottom) & (column >= left) & (column < right)


def _mix_pairs(
    pixels: jax.Array, targets: jax.Array, labels: jax.Array, settings: AugmentConfig, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Blend both rows of each pair with the other row, pixels and targets, by mixup or by CutMix.

    Where both are on, each pair draws one of the two.
    """
    batch, height, width, _ = pixels.shape
    choice_key, mixup_key, cutmix_key = jax.random.split(key, 3)
    pairs = batch // 2
    own_pixels = own_label = jnp.ones((pairs, 1, 1))  # the weights of a row itself; its partner has the rest
    if settings.mixup:
        own_pixels = own_label = _symmetric_beta(mixup_key, settings.mixup, pairs)[:, None, None]
    if settings.cutmix:
        kept = 1.0 - _cutmix_mask(pairs, height, width, settings.cutmix, cutmix_key)
        # As timm does for both: either is chosen with the same probability.
        cuts = jax.random.bernoulli(choice_key, 0.5, (pairs, 1, 1)) if settings.mixup else True
        own_pixels = jnp.where(cuts, kept, own_pixels)
        # The edge of the image may cut the rectangle off, so the weight of the label is the area really
        # pasted.
        own_label = jnp.where(cuts, kept.mean((1, 2), keepdims=True), own_label)
    both_count = (labels.reshape(pairs, 2) >= 0).all(1)[:, None, None]
    own_pixels, own_label = jnp.where(both_count, own_pixels, 1), jnp.where(both_count, own_label, 1)

    def blend(x: jax.Array, own: jax.Array) -> jax.Array:
        both = x.reshape(pairs, 2, *x.shape[1:])
        return (own * both + (1 - own) * both[:, ::-1]).reshape(x.shape)

    return blend(pixels, own_pixels[:, None, :, :, None]), blend(targets, own_label)


def _cutmix_mask(pairs: int, height: int, width: int, alpha: float, key: jax.Array) -> jax.Array:
    """The part that CutMix pastes (Yun et al. 2019, arXiv:1905.04899): (pairs, height, width) bool.

    The centre of the rectangle is any pixel, and the edge of the image cuts the rectangle off.
    """
    area_key, centre_key = jax.random.split(key)
    side = jnp.sqrt(1 - _symmetric_beta(area_key, alpha, pairs))
    centre = jnp.floor(jax.random.uniform(centre_key, (pairs, 2)) * jnp.array([height, width]))
    half = jnp.floor(side[:, None] * jnp.array([height, width])) // 2
    (top, left), (bottom, right) = (centre - half).T, (centre + half).T
    return _rectangle_mask([top, left, bottom, right], height, width)


def _symmetric_beta(key: jax.Array, alpha: float, n: int) -> jax.Array:
    """Draw (n,) float32 from Beta(α, α) in closed form: Student's t by Bailey (1994), mapped to [0, 1].

    jax.random.beta would draw again until a draw is accepted, and over several devices all wait for the
    slowest.
    """
    u, v = jax.random.uniform(key, (n, 2)).T
    log_s, c = jnp.log(u) / alpha, jnp.cos(2 * jnp.pi * v)
    complement = -jnp.expm1(log_s)  # 1 − s, without cancellation where s is close to 1
    x = (1 + c * jnp.sqrt(complement / (jnp.exp(log_s) + complement * c**2))) / 2
    return jnp.clip(x, 0, 1)  # rounding errors may lead just outside of it
