"""The batch×model mesh, and which axis each array lives on."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH, MODEL = "batch", "model"


def make_mesh(batch: int, model: int) -> Mesh:
    """All devices of the run as a (batch, model) mesh, in an order that suits the interconnect."""
    return jax.make_mesh((batch, model), (BATCH, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


def rows(mesh: Mesh) -> NamedSharding:
    """For arrays whose first dim is the global batch."""
    return NamedSharding(mesh, P(BATCH))


def each_device(mesh: Mesh) -> NamedSharding:
    """For arrays whose first dim counts devices: a word of each to all."""
    return NamedSharding(mesh, P((BATCH, MODEL)))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def weight_sharding(mesh: Mesh, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    """Where a leaf of the train state lives: its output channels over the model axis.

    The last dim of every float leaf is its output channels (HWIO kernels, (in, out) classifier, batch
    norm), and optimizer state has the shapes of the weights. Where the axis does not divide it, as with 10
    classes over 4 devices, the dim before takes its place; scalars and short vectors are replicated.
    """
    size = mesh.shape[MODEL]
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        for dim in range(leaf.ndim - 1, max(leaf.ndim - 3, -1), -1):
            if leaf.shape[dim] % size == 0:
                return NamedSharding(mesh, P(*[None] * dim, MODEL))
    return replicated(mesh)
