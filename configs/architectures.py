"""The ResNet family as data, so that a plan can count parameters and FLOPs without importing jax.

models/resnet.py builds exactly these; a test holds the two together.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

EXPANSION = {"basic": 1, "bottleneck": 4}


@dataclass(frozen=True)
class Architecture:
    """A ResNet: the kind of its blocks, and how many of them each stage has."""

    block: Literal["basic", "bottleneck"]
    layers: tuple[int, ...]

    def num_features(self, width: int) -> int:
        """Channels that the classifier sees; `width` is that of the first stage, and each stage doubles it."""
        return width * 2 ** (len(self.layers) - 1) * EXPANSION[self.block]


# He et al. 2015, https://arxiv.org/abs/1512.03385, table 1.
ARCHITECTURES = {
    "resnet18": Architecture("basic", (2, 2, 2, 2)),
    "resnet34": Architecture("basic", (3, 4, 6, 3)),
    "resnet50": Architecture("bottleneck", (3, 4, 6, 3)),
    "resnet101": Architecture("bottleneck", (3, 4, 23, 3)),
    "resnet152": Architecture("bottleneck", (3, 8, 36, 3)),
    # Not published: one block, for rehearsals and tests, in which ResNet-18 would mostly be compiled.
    "resnet4": Architecture("basic", (1,)),
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


@dataclass(frozen=True)
class Convolution:
    """One convolution, without bias and followed by a batch norm."""

    kernel: int
    in_channels: int
    out_channels: int
    reduction: int
    """Pixels of the image along each axis to one of its output."""


def convolutions(name: str, *, width: int, stem: str) -> Iterator[Convolution]:
    """Every convolution of `name`, in order."""
    architecture = ARCHITECTURES[name]
    expansion = EXPANSION[architecture.block]
    pools = stem == "imagenet"
    yield Convolution(7, 3, width, 2) if pools else Convolution(3, 3, width, 1)
    reduction = 4 if pools else 1
    for block in chain.from_iterable(blocks(architecture, width)):
        before, reduction = reduction, reduction * block.stride
        out_channels = block.channels * expansion
        if architecture.block == "basic":
            yield Convolution(3, block.in_channels, block.channels, reduction)
            yield Convolution(3, block.channels, block.channels, reduction)
        else:
            yield Convolution(1, block.in_channels, block.channels, before)
            yield Convolution(3, block.channels, block.channels, reduction)
            yield Convolution(1, block.channels, out_channels, reduction)
        if block.stride != 1 or block.in_channels != out_channels:
            yield Convolution(1, block.in_channels, out_channels, reduction)


def num_parameters(name: str, *, num_classes: int, width: int = 64, stem: str = "imagenet") -> int:
    """Trainable parameters of `name`; batch-norm statistics are not counted."""
    total = sum(
        c.kernel**2 * c.in_channels * c.out_channels + 2 * c.out_channels
        for c in convolutions(name, width=width, stem=stem)
    )
    return total + (ARCHITECTURES[name].num_features(width) + 1) * num_classes


def flops_per_image(name: str, *, image_size: int, num_classes: int, width: int, stem: str) -> int:
    """Of a forward pass, two for a multiply-add, in convolutions and classifier; the rest is below 1 %."""
    multiply_adds = sum(
        math.ceil(image_size / c.reduction) ** 2 * c.kernel**2 * c.in_channels * c.out_channels
        for c in convolutions(name, width=width, stem=stem)
    )
    return 2 * (multiply_adds + ARCHITECTURES[name].num_features(width) * num_classes)
