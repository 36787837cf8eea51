"""The ResNet family as data, so that a plan can count parameters without importing jax.

models/resnet.py builds exactly these; a test holds the two together.
"""

from dataclasses import dataclass
from typing import Literal

EXPANSION = {"basic": 1, "bottleneck": 4}


@dataclass(frozen=True)
class Architecture:
    """A ResNet of four stages: the kind of its blocks, and how many each stage has."""

    block: Literal["basic", "bottleneck"]
    layers: tuple[int, int, int, int]


# He et al. 2015, https://arxiv.org/abs/1512.03385, table 1.
ARCHITECTURES = {
    "resnet18": Architecture("basic", (2, 2, 2, 2)),
    "resnet34": Architecture("basic", (3, 4, 6, 3)),
    "resnet50": Architecture("bottleneck", (3, 4, 6, 3)),
    "resnet101": Architecture("bottleneck", (3, 4, 23, 3)),
    "resnet152": Architecture("bottleneck", (3, 8, 36, 3)),
}


@dataclass(frozen=True)
class Block:
    """One residual block: channels in, channels of its 3×3, stride of that 3×3."""

    in_channels: int
    channels: int
    stride: int


def blocks(architecture: Architecture, width: int) -> list[list[Block]]:
    """The blocks of each stage; `width` is the channel count of the first stage's 3×3."""
    expansion = EXPANSION[architecture.block]
    stages: list[list[Block]] = []
    in_channels = width
    for stage, num_blocks in enumerate(architecture.layers):
        channels = width * 2**stage
        stages.append([])
        for i in range(num_blocks):
            stages[-1].append(Block(in_channels, channels, 2 if stage > 0 and i == 0 else 1))
            in_channels = channels * expansion
    return stages


def num_parameters(name: str, *, num_classes: int, width: int = 64, stem: str = "imagenet") -> int:
    """Trainable parameters of `name`; batch-norm statistics are not counted."""
    architecture = ARCHITECTURES[name]
    expansion = EXPANSION[architecture.block]

    def conv_bn(kernel: int, in_channels: int, out_channels: int) -> int:
        return kernel * kernel * in_channels * out_channels + 2 * out_channels

    total = conv_bn(7 if stem == "imagenet" else 3, 3, width)
    for stage in blocks(architecture, width):
        for b in stage:
            out_channels = b.channels * expansion
            if architecture.block == "basic":
                total += conv_bn(3, b.in_channels, b.channels) + conv_bn(3, b.channels, b.channels)
            else:
                total += conv_bn(1, b.in_channels, b.channels) + conv_bn(3, b.channels, b.channels)
                total += conv_bn(1, b.channels, out_channels)
            if b.stride != 1 or b.in_channels != out_channels:
                total += conv_bn(1, b.in_channels, out_channels)
    return total + (width * 8 * expansion + 1) * num_classes
