"""ResNet v1.5 in flax nnx: torchvision's padding and initialisation, images as NHWC, batch norm with a scope.

He et al. 2015, https://arxiv.org/abs/1512.03385. In v1.5 a bottleneck has its stride on the 3×3 convolution.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer, variance_scaling

from configs.architectures import EXPANSION, Architecture, Block, blocks

# torchvision: kaiming_normal_(mode="fan_out", nonlinearity="relu") for convolutions, and
# kaiming_uniform_(a=sqrt(5)), which is U(-1/sqrt(fan_in), 1/sqrt(fan_in)), for the classifier.
CONV_INIT = variance_scaling(2.0, "fan_out", "normal")
CLASSIFIER_INIT = variance_scaling(1 / 3, "fan_in", "uniform")


class BatchNorm(nnx.Module):
    """Batch normalisation (Ioffe & Szegedy 2015) of NHWC images over the whole batch, or over groups of n.

    On a batch-sharded mesh `scope="global"` is synchronised batch norm: each layer all-reduces its statistics
    in the forward pass and again in the backward pass. A group that lies on one device needs neither. Running
    statistics are the mean over the groups. Variances are biased, as in flax.

    Statistics are computed in float32 whatever the dtype of the images.
    """

    def __init__(
        self,
        num_features: int,
        *,
        scope: Literal["global"] | int,
        momentum: float,
        scale_init: Initializer = jax.nn.initializers.ones,
        rngs: nnx.Rngs,
        epsilon: float = 1e-5,
    ):
        self.scale = nnx.Param(scale_init(rngs.params(), (num_features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((num_features,), jnp.float32))
        # Variables of another type than parameters, so that the optimizer and the gradient leave them out.
        self.mean = nnx.BatchStat(jnp.zeros((num_features,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((num_features,), jnp.float32))
        self.scope = scope
        self.momentum = momentum
        self.epsilon = epsilon

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Normalise x, (batch, height, width, channels) of any float dtype. Returns the same shape and dtype.

        With `train`, by the statistics of the batch or group, and the running statistics are updated;
        otherwise by the running statistics. Raises ValueError if groups do not divide the batch.
        """
        if not train:
            return self._normalise(x, self.mean[...], self.var[...])
        group = x.shape[0] if self.scope == "global" else self.scope
        if x.shape[0] % group:
            raise ValueError(f"batch norm over groups of {group} images: a batch of {x.shape[0]} has none")
        grouped = x.reshape(-1, group, *x.shape[1:])
        # In bfloat16, sums over thousands of pixels would lose most of their digits.
        x32 = grouped.astype(jnp.float32)
        mean = x32.mean((1, 2, 3), keepdims=True)
        # As E[x²] − E[x]², which reads the images once instead of twice. Rounding may make it negative.
        var = jnp.maximum(jnp.square(x32).mean((1, 2, 3), keepdims=True) - jnp.square(mean), 0)
        for running, new in ((self.mean, mean), (self.var, var)):
            # The running statistics are not part of the loss.
            new = jax.lax.stop_gradient(new).mean((0, 1, 2, 3))
            running[...] = self.momentum * running[...] + (1 - self.momentum) * new
        return self._normalise(grouped, mean, var).reshape(x.shape)

    def _normalise(self, x: jax.Array, mean: jax.Array, var: jax.Array) -> jax.Array:
        scale = self.scale[...] * jax.lax.rsqrt(var + self.epsilon)
        return ((x.astype(jnp.float32) - mean) * scale + self.bias[...]).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """A basic (3×3, 3×3) or bottleneck (1×1, 3×3, 1×1) block with its shortcut.

    Where `zero_init_last_gamma` is true, the last batch norm starts with a scale of 0, so that the block
    starts as the identity (Goyal et al. 2017, arXiv:1706.02677, 5.1).
    """

    def __init__(
        self,
        kind: Literal["basic", "bottleneck"],
        block: Block,
        *,
        conv: Callable[..., nnx.Conv],
        norm: Callable[..., BatchNorm],
        zero_init_last_gamma: bool,
    ):
        out_channels = block.channels * EXPANSION[kind]
        convs = (
            [conv(block.in_channels, block.channels, 3, block.stride), conv(block.channels, out_channels, 3)]
            if kind == "basic"
            else [
                conv(block.in_channels, block.channels, 1),
                conv(block.channels, block.channels, 3, block.stride),
                conv(block.channels, out_channels, 1),
            ]
        )
        zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
        norms = [norm(c.out_features) for c in convs[:-1]]
        norms.append(norm(out_channels, scale_init=zeros if zero_init_last_gamma else ones))
        self.convs, self.norms = nnx.List(convs), nnx.List(norms)
        # Shortcuts project only where the shape changes: option B of He et al. 2015.
        projects = block.stride != 1 or block.in_channels != out_channels
        self.shortcut = conv(block.in_channels, out_channels, 1, block.stride) if projects else None
        self.shortcut_norm = norm(out_channels) if projects else None

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """x is (batch, height, width, block.in_channels). The result has the stride and the channels of the block."""
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y), train=train)
            # After the last one, the ReLU follows the sum with the shortcut.
            if i < len(self.convs) - 1:
                y = nnx.relu(y)
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x), train=train)
        return nnx.relu(x + y)


class ResNet(nnx.Module):
    """The residual network of `architecture`.

    `width` is the number of channels of the first stage, 64 as published. The `imagenet` stem is a 7×7
    convolution of stride 2 and a 3×3 max-pool, the `small` one a 3×3 convolution of stride 1. The network
    computes in `dtype`; parameters and batch statistics are float32. `batch_norm` is `global`, or the number
    of images that share statistics.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        num_classes: int,
        width: int,
        stem: Literal["imagenet", "small"],
        dtype: jnp.dtype,
        batch_norm: Literal["global"] | int,
        batch_norm_momentum: float,
        zero_init_last_gamma: bool,
        rngs: nnx.Rngs,
    ):
        def conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nnx.Conv:
            return nnx.Conv(
                in_channels,
                out_channels,
                (kernel, kernel),
                strides=(stride, stride),
                # Symmetric, as in torchvision. At stride 2, SAME would pad the far side alone.
                padding=kernel // 2,
                # Batch norm subtracts the mean of each channel, and with it any bias.
                use_bias=False,
                dtype=dtype,
                param_dtype=jnp.float32,
                kernel_init=CONV_INIT,
                rngs=rngs,
            )

        norm = partial(BatchNorm, scope=batch_norm, momentum=batch_norm_momentum, rngs=rngs)
        self.dtype = dtype
        self.pool = stem == "imagenet"
        self.stem = conv(3, width, 7, 2) if self.pool else conv(3, width, 3)
        self.stem_norm = norm(width)
        self.stages = nnx.List(
            nnx.List(
                ResidualBlock(
                    architecture.block, b, conv=conv, norm=norm, zero_init_last_gamma=zero_init_last_gamma
                )
                for b in stage
            )
            for stage in blocks(architecture, width)
        )
        features = architecture.num_features(width)
        self.classifier = nnx.Linear(
            features,
            num_classes,
            dtype=dtype,
            param_dtype=jnp.float32,
            kernel_init=CLASSIFIER_INIT,
            bias_init=lambda key, shape, dtype: jax.random.uniform(
                key, shape, dtype, -(features**-0.5), features**-0.5
            ),
            rngs=rngs,
        )

    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Float32 logits (batch, num_classes) of images (batch, height, width, 3) of any float dtype.

        With `train`, batch norm uses the statistics of the batch and updates the running ones.
        """
        x = nnx.relu(self.stem_norm(self.stem(images.astype(self.dtype)), train=train))
        if self.pool:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage in self.stages:
            for block in stage:
                x = block(x, train=train)
        # The loss and its softmax need float32.
        return self.classifier(x.mean((1, 2))).astype(jnp.float32)
