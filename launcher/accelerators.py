"""The table of Cloud TPUs: generations, sizes, topologies, and the environment of several slices."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from configs.errors import UserError
from configs.load import nearest

CHIPS_PER_VM = 4
"""Chips of each VM of a slice that has more than one VM, in every generation."""


@dataclass(frozen=True)
class Generation:
    """One generation of TPU chips, as the Cloud TPU API offers it."""

    name: str
    type_prefix: str
    """What the API's accelerator types begin with."""
    api_type: str
    """The API's AcceleratorConfig.Type."""
    counts: Literal["cores", "chips"]
    """What the size in a type's name counts; a chip has two cores, whatever JAX makes of them."""
    devices_per_chip: int
    hbm_gib: int
    """Memory of a chip, in GiB."""
    hbm_gb_per_second: int
    """Memory bandwidth of a chip, in GB/s."""
    bf16_tflops: int
    """Peak of a chip in bfloat16, in TFLOP/s."""
    runtime: str
    """Software version that VMs of this generation are created with."""
    sizes: dict[int, str]
    """Common sizes, ascending, and the topology of each."""
    max_chips_per_vm: int = CHIPS_PER_VM
    """Chips of the largest slice that is one VM."""
    max_cubes: int = 0
    """Cubes of 4x4x4 chips that a slice may be made of; 0 where there are only the common sizes."""


@dataclass(frozen=True)
class TpuSlice:
    """One slice: chips that are wired to each other, and the VMs that they belong to."""

    generation: Generation
    accelerator_type: str
    """Name of the slice's kind in the API, such as v4-32."""
    topology: str
    chips: int
    vms: int
    chips_per_vm: int
    devices_per_vm: int
    """JAX devices."""


# From https://cloud.google.com/tpu/docs, the pages v2, v3, v4, v5e, v5p, v6e and runtimes. Each core of a v2 or v3
# chip is a device of JAX; a v4 or v5p chip, of two cores as well, is one device.
_BASE = "tpu-ubuntu2204-base"
_CUBES = {
    8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 384: "4x4x12", 512: "4x8x8",
    1024: "8x8x8", 1536: "8x8x12", 2048: "8x8x16", 4096: "8x16x16",
}  # fmt: skip
_LARGER_CUBES = {6144: "12x16x16", 8192: "16x16x16", 12288: "16x16x24"}
_SQUARES = {
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16",
}  # fmt: skip
# More than one cube of v4 or v5p are joined by optical switches, in any AxBxC of multiples of 4 with A <= B <= C. A size
# without a topology is the shape most like a cube (https://cloud.google.com/tpu/docs/types-topologies).
CUBE = 4
MAX_DIM = 256
_V2 = {8: "2x2", 32: "4x4", 128: "8x8", 256: "8x16", 512: "16x16"}
_V3 = {
    8: "2x2", 32: "4x4", 64: "4x8", 128: "8x8", 256: "8x16", 512: "16x16", 1024: "16x32", 2048: "32x32",
}  # fmt: skip
_V5E, _V5P, _V6E = "v2-alpha-tpuv5-lite", "v2-alpha-tpuv5", "v2-alpha-tpuv6e"
GENERATIONS = {
    g.name: g
    for g in (
        Generation("v2", "v2", "V2", "cores", 2, 16, 700, 46, _BASE, _V2),
        Generation("v3", "v3", "V3", "cores", 2, 32, 900, 123, _BASE, _V3),
        Generation("v4", "v4", "V4", "cores", 1, 32, 1228, 275, _BASE, _CUBES, max_cubes=64),
        Generation("v5e", "v5litepod", "V5LITE_POD", "chips", 1, 16, 819, 197, _V5E, _SQUARES, 8),
        Generation(
            "v5p", "v5p", "V5P", "cores", 1, 95, 2765, 459, _V5P, _CUBES | _LARGER_CUBES, max_cubes=96
        ),
        Generation("v6e", "v6e", "V6E", "chips", 1, 32, 1640, 918, _V6E, _SQUARES, 8),
    )
}


def parse_tpu(text: str) -> tuple[TpuSlice, int]:
    """The slice that `text` names, and the number of slices. Raises UserError with the nearest sizes.

    `text` is what follows `tpu-` in the name of a cluster: GENERATION-SHAPE or GENERATION-SHAPExSLICES, where a
    shape is a size, as in `v4-32`, or a topology, as in `v4-2x2x4`. A text that can be read as a topology is
    one: `v5e-4x8` is 32 chips, `v5e-64x2` is two slices.
    """
    name, _, shape = text.partition("-")
    generation = _generation(name, text)
    if topology := _topology(generation, shape):
        return tpu_slice(generation, topology), 1
    one_slice, _, slices = shape.rpartition("x")
    topology = _topology(generation, one_slice)
    if topology and re.fullmatch(r"[1-9][0-9]{0,3}", slices):
        return tpu_slice(generation, topology), int(slices)
    raise UserError(f"cluster = tpu-{text}: no such size; nearest: {_nearest_sizes(generation, shape)}")


def tpu_slice(generation: Generation, topology: str) -> TpuSlice:
    """The slice of a `generation` with this topology, which is valid."""
    chips = _chips(topology)
    size = 2 * chips if generation.counts == "cores" else chips
    # A v5e or v6e slice of 8 chips is one VM, but a larger one has VMs of 4 chips each.
    chips_per_vm = chips if chips <= generation.max_chips_per_vm else CHIPS_PER_VM
    vms, devices_per_vm = chips // chips_per_vm, chips_per_vm * generation.devices_per_chip
    name = f"{generation.type_prefix}-{size}"
    return TpuSlice(generation, name, topology, chips, vms, chips_per_vm, devices_per_vm)


def _topology(generation: Generation, shape: str) -> str | None:
    """The topology that a size or a topology names; None where it names nothing."""
    if shape in generation.sizes.values():
        return shape
    if re.fullmatch(r"[1-9][0-9]{0,5}", shape):
        return _all_sizes(generation).get(int(shape))
    if not re.fullmatch(r"[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){2}", shape):
        return None
    dims = [int(dim) for dim in shape.split("x")]
    is_of_cubes = dims == sorted(dims) and max(dims) <= MAX_DIM and not any(dim % CUBE for dim in dims)
    return shape if is_of_cubes and math.prod(dims) <= generation.max_cubes * CUBE**3 else None


def _all_sizes(generation: Generation) -> dict[int, str]:
    """All valid sizes, ascending, and the topology that each has by default."""
    size_of_cube = 2 * CUBE**3
    cubes = {count * size_of_cube: _like_a_cube(count) for count in range(1, generation.max_cubes + 1)}
    found = {size: topology for size, topology in cubes.items() if topology} | generation.sizes
    return dict(sorted(found.items()))


def _like_a_cube(num_cubes: int) -> str | None:
    """The topology of `num_cubes` cubes that is most like a cube; None where it would be too long."""
    shapes = [
        (a, b, num_cubes // (a * b))
        for a in range(1, num_cubes + 1)
        for b in range(a, num_cubes // a + 1)
        if num_cubes % (a * b) == 0 and b <= num_cubes // (a * b)
    ]
    dims = [CUBE * dim for dim in min(shapes, key=sum)]
    return "x".join(map(str, dims)) if max(dims) <= MAX_DIM else None


def _chips(topology: str) -> int:
    return math.prod(map(int, topology.split("x")))


def _generation(name: str, text: str) -> Generation:
    for generation in GENERATIONS.values():
        if name in (generation.name, generation.type_prefix):
            return generation
    names = ", ".join(GENERATIONS)
    # TPU7x and its successors are offered through Compute Engine and GKE alone.
    if re.match(r"(tpu)?v?([7-9]|[1-9][0-9])", name):
        reason = "chips newer than v6e do not come through the Cloud TPU API"
        raise UserError(f"cluster = tpu-{text}: {reason}; allowed: {names}")
    hint = nearest(name, list(GENERATIONS))
    raise UserError(
        f"cluster = tpu-{text}: unknown generation {name}{hint} (there are: {names}; see `launch clusters tpu`)"
    )


def _nearest_sizes(generation: Generation, shape: str) -> str:
    """The next below and the next above `shape`, written as it is: a size, or a topology."""
    numbers = [int(n) for n in re.findall(r"[0-9]{1,6}", shape)] or [0]
    if len(numbers) < 3:
        wanted, names = numbers[0], {size: str(size) for size in _all_sizes(generation)}
    else:
        dims = len(generation.sizes[8].split("x"))
        wanted, names = math.prod(numbers[:dims]), {_chips(t): t for t in _all_sizes(generation).values()}
    below, above = [n for n in names if n <= wanted], [n for n in names if n > wanted]
    return ", ".join(f"tpu-{generation.name}-{names[n]}" for n in [*below[-1:], *above[:1]])


def megascale_environment(coordinator: str, slices: int, index: int) -> dict[str, str]:
    """The variables by which libtpu connects `slices` slices, on a VM of slice `index`; none where there is one slice.

    `coordinator` is the address of the first VM (https://cloud.google.com/tpu/docs/multislice-introduction).
    """
    if slices == 1:
        return {}
    return {
        "MEGASCALE_COORDINATOR_ADDRESS": coordinator,
        "MEGASCALE_NUM_SLICES": str(slices),
        "MEGASCALE_SLICE_ID": str(index),
    }
