"""The ResNet family as data, so that a plan can count parameters and FLOPs without importing jax.

models/resnet.py builds exactly these networks; a test compares both counts of parameters.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

EXPANSION = {"basic": 1, "bottleneck": 4}


@dataclass(frozen=True)
class Architecture:
    """A ResNet: the kind of its blocks, and the number of blocks of each stage."""

    block: Literal["basic", "bottleneck"]
    layers: tuple[int, ...]

    def num_features(self, width: int) -> int:
        """Channels that the classifier receives; `width` is the first stage's, and each further stage doubles it."""
        return width * 2 ** (len(self.layers) - 1) * EXPANSION[self.block]


# He et al. 2015, https://arxiv.org/abs/1512.03385, table 1.
ARCHITECTURES = {
    "resnet18": Architecture("basic", (2, 2, 2, 2)),
    "resnet34": Architecture("basic", (3, 4, 6, 3)),
    "resnet50": Architecture("bottleneck", (3, 4, 6, 3)),
    "resnet101": Architecture("bottleneck", (3, 4, 23, 3)),
    "resnet152": Architecture("bottleneck", (3, 8, 36, 3)),
    # Not a published network: one block, for rehearsals and tests, which would spend most of their time
    # compiling a ResNet-18.
    "resnet4": Architecture("basic", (1,)),
}


@dataclass(frozen=True)
class Block:
    """One residual block: its input channels, and the channels and the stride of its 3×3 convolution."""

    in_channels: int
    channels: int
    stride: int


def blocks(architecture: Architecture, width: int) -> list[list[Block]]:
    """The blocks of each stage; `width` is the number of channels of the 3×3 convolutions in the first stage."""
    expansion = EXPANSION[architecture.block]
    stages: list[list[Block]] = []
    in_channels = width
    for stage, num_blocks in enumerate(architecture.layers):
        channels = width * 2**stage
        stages.append([])
        for i in range(num_blocks):
            # The stem has already reduced the image for the first stage; each later stage halves it once.
            stages[-1].append(Block(in_channels, channels, 2 if stage > 0 and i == 0 else 1))
            in_channels = channels * expansion
    return stages


@dataclass(frozen=True)
class Convolution:
    """One convolution, which has no bias and is followed by a batch norm."""

    kernel: int
    in_channels: int
    out_channels: int
    reduction: int
    """Pixels of the input image, along each axis, per pixel of the output."""


def convolutions(name: str, *, width: int, stem: str) -> Iterator[Convolution]:
    """Every convolution of the architecture `name`, in order."""
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
            # The stride is in the 3×3, not in this 1×1: "ResNet v1.5", as torchvision's networks have it.
            yield Convolution(1, block.in_channels, block.channels, before)
            yield Convolution(3, block.channels, block.channels, reduction)
            yield Convolution(1, block.channels, out_channels, reduction)
        # The shortcut needs a projection where its shape differs from the block's output.
        if block.stride != 1 or block.in_channels != out_channels:
            yield Convolution(1, block.in_channels, out_channels, reduction)


def parameter_shapes(
    name: str, *, num_classes: int, width: int = 64, stem: str = "imagenet"
) -> Iterator[tuple[int, ...]]:
    """Shapes of all trainable parameters of `name`: kernels are (height, width, in, out)."""
    for c in convolutions(name, width=width, stem=stem):
        yield c.kernel, c.kernel, c.in_channels, c.out_channels
        yield from [(c.out_channels,)] * 2  # scale and offset of its batch norm
    yield ARCHITECTURES[name].num_features(width), num_classes
    yield (num_classes,)


def num_parameters(shapes: Iterable[tuple[int, ...]]) -> int:
    """Number of trainable parameters of these shapes, without the batch-norm statistics."""
    return sum(map(math.prod, shapes))


def sharded_dim(shape: tuple[int, ...], num_shards: int) -> int | None:
    """The dim of a parameter that is split into `num_shards` equal parts over the model axis; None: the whole is copied.

    It is the output channels, the last dim, or the dim before it where `num_shards` does not divide them, as 4 does
    not divide 10 classes. Height and width of a kernel are never split: each convolution would need its neighbour's
    part.
    """
    dims = range(len(shape) - 1, max(len(shape) - 3, -1), -1)
    return next((dim for dim in dims if shape[dim] % num_shards == 0), None)


def share_of_device(shapes: Iterable[tuple[int, ...]], num_shards: int) -> float:
    """Fraction of all parameters that each device of a model axis of `num_shards` devices holds."""
    total = held = 0
    for shape in shapes:
        size = math.prod(shape)
        total += size
        held += size if sharded_dim(shape, num_shards) is None else size // num_shards
    return held / total


def flops_per_image(name: str, *, image_size: int, num_classes: int, width: int, stem: str) -> int:
    """FLOPs of a forward pass for one image, with two per multiply-add.

    Only convolutions and the classifier are counted: all other operations are below 1 %.
    """
    multiply_adds = sum(
        math.ceil(image_size / c.reduction) ** 2 * c.kernel**2 * c.in_channels * c.out_channels
        for c in convolutions(name, width=width, stem=stem)
    )
    return 2 * (multiply_adds + ARCHITECTURES[name].num_features(width) * num_classes)
