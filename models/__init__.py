"""The networks, by name. A new family is one file here and one branch below."""

import jax.numpy as jnp
from flax import nnx

from configs.architectures import ARCHITECTURES
from configs.schema import ModelConfig
from models.resnet import ResNet


def build(config: ModelConfig, rngs: nnx.Rngs) -> ResNet:
    """The network that `config` describes, with fresh float32 parameters drawn from `rngs`."""
    return ResNet(
        ARCHITECTURES[config.name],
        num_classes=config.num_classes,
        width=config.width,
        stem=config.stem,
        dtype=jnp.dtype(config.dtype),
        batch_norm=config.batch_norm,
        batch_norm_momentum=config.batch_norm_momentum,
        zero_init_last_gamma=config.zero_init_last_gamma,
        rngs=rngs,
    )
