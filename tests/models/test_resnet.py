"""The family is torchvision's: sizes, shapes, initialisation, and batch norm equal to a plain reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from configs.architectures import ARCHITECTURES, num_parameters, parameter_shapes
from configs.schema import ModelConfig
from models.resnet import BatchNorm

PUBLISHED = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}


def build(**settings: object) -> nnx.Module:
    return models.build(ModelConfig.model_validate(settings), nnx.Rngs(0))


def count(model: nnx.Module) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_torchvisions_and_the_plans(name: str) -> None:
    model = nnx.eval_shape(lambda: build(name=name))
    assert count(model) == PUBLISHED[name] == num_parameters(parameter_shapes(name, num_classes=1000))


@pytest.mark.parametrize("name", ["resnet4", "resnet18", "resnet50"])
@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_the_plan_counts_what_is_built_for_any_width_and_stem(name: str, stem: str) -> None:
    model = nnx.eval_shape(lambda: build(name=name, stem=stem, width=12, num_classes=7))
    assert count(model) == num_parameters(parameter_shapes(name, stem=stem, width=12, num_classes=7))


def test_every_published_depth_is_there() -> None:
    assert set(ARCHITECTURES) == {*PUBLISHED, "resnet4"}


def intermediate_shapes(size: int, **settings: object) -> list[tuple[int, ...]]:
    """Shapes after the stem and after each stage."""

    def run() -> list[jax.Array]:
        model = build(width=4, dtype="float32", **settings)
        x = model.stem(jnp.zeros((1, size, size, 3)))
        if model.pool:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        outputs = [x]
        for stage in model.stages:
            for block in stage:
                x = block(x, train=False)
            outputs.append(x)
        return outputs

    return [x.shape for x in nnx.eval_shape(run)]


def test_resolution_halves_where_torchvisions_does() -> None:
    shapes = intermediate_shapes(224, name="resnet50")
    assert [s[1:] for s in shapes] == [(56, 56, 4), (56, 56, 16), (28, 28, 32), (14, 14, 64), (7, 7, 128)]


def test_small_stem_keeps_small_images_large() -> None:
    shapes = intermediate_shapes(32, name="resnet18", stem="small")
    assert [s[1] for s in shapes] == [32, 32, 16, 8, 4]


def test_bottleneck_strides_on_its_3x3() -> None:
    block = nnx.eval_shape(lambda: build(name="resnet50", width=4)).stages[1][0]
    assert [conv.strides for conv in block.convs] == [(1, 1), (2, 2), (1, 1)]


def test_initialisation_is_torchvisions() -> None:
    model = build(name="resnet4", width=128, num_classes=1000)
    kernel = model.stages[0][0].convs[1].kernel[...]
    assert kernel.shape == (3, 3, 128, 128)
    assert float(kernel.std()) == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    bound = 128**-0.5
    for weight in (model.classifier.kernel[...], model.classifier.bias[...]):
        assert float(jnp.abs(weight).max()) <= bound
        assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.05)


def test_residual_branches_start_at_zero_when_asked() -> None:
    for zero in (True, False):
        model = build(name="resnet18", width=4, zero_init_last_gamma=zero, num_classes=2)
        last = [block.norms[-1].scale[...] for stage in model.stages for block in stage]
        assert all(bool((scale == (0 if zero else 1)).all()) for scale in last)


def test_bfloat16_computes_but_does_not_store() -> None:
    def run() -> tuple[jax.Array, jax.Array, nnx.State]:
        model = build(name="resnet18", width=4, stem="small", num_classes=10, dtype="bfloat16")
        features = model.stem(jnp.ones((4, 8, 8, 3)))
        return (
            features,
            model(jnp.ones((4, 8, 8, 3)), train=True),
            nnx.state(model, (nnx.Param, nnx.BatchStat)),
        )

    features, logits, state = nnx.eval_shape(run)
    assert (features.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}


def plain_batch_norm(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each group normalised by itself in float64; also the mean over groups of their mean and variance."""
    out, means, variances = [], [], []
    for i in range(0, len(x), group):
        part = x[i : i + group].astype(np.float64)
        means.append(part.mean((0, 1, 2)))
        variances.append(part.var((0, 1, 2)))
        out.append((part - means[-1]) / np.sqrt(variances[-1] + 1e-5))
    return np.concatenate(out), np.mean(means, 0), np.mean(variances, 0)


@pytest.mark.parametrize("scope", ["global", 2, 4, 16])
def test_batch_norm_equals_a_plain_per_group_reference(scope: str | int) -> None:
    x = np.random.default_rng(0).normal(3, 2, (16, 5, 5, 6)).astype(np.float32)
    layer = BatchNorm(6, scope=scope, momentum=0.9, rngs=nnx.Rngs(0))
    y = layer(jnp.asarray(x), train=True)
    expected, mean, var = plain_batch_norm(x, 16 if scope == "global" else scope)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(layer.mean[...], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(layer.var[...], 0.9 + 0.1 * var, rtol=1e-5)
    running = (x - np.asarray(layer.mean[...])) / np.sqrt(np.asarray(layer.var[...]) + 1e-5)
    np.testing.assert_allclose(layer(jnp.asarray(x), train=False), running, atol=1e-5)


def test_batch_norm_gradient_equals_the_plain_reference_of_each_group() -> None:
    x = jnp.asarray(np.random.default_rng(1).normal(1, 2, (8, 3, 3, 4)), jnp.float32)
    weight = jnp.asarray(np.random.default_rng(2).normal(size=x.shape), jnp.float32)

    def ours(x: jax.Array) -> jax.Array:
        return (BatchNorm(4, scope=4, momentum=0.9, rngs=nnx.Rngs(0))(x, train=True) * weight).sum()

    def plain(x: jax.Array) -> jax.Array:
        groups = x.reshape(2, 4, 3, 3, 4)
        mean, var = groups.mean((1, 2, 3), keepdims=True), groups.var((1, 2, 3), keepdims=True)
        return (((groups - mean) / jnp.sqrt(var + 1e-5)).reshape(x.shape) * weight).sum()

    np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(plain)(x), atol=2e-5)


def test_a_batch_without_whole_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="groups of 3"):
        BatchNorm(4, scope=3, momentum=0.9, rngs=nnx.Rngs(0))(jnp.ones((8, 2, 2, 4)), train=True)
