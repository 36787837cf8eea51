"""The batch×model mesh, which axis each array lives on, and a barrier for the processes that share it."""

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH, MODEL = "batch", "model"
BARRIER_SECONDS = 1800


def make_mesh(batch: int, model: int) -> Mesh:
    """All devices of the run as a (batch, model) mesh, in an order that suits the interconnect."""
    return jax.make_mesh((batch, model), (BATCH, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For arrays whose first dim is the global batch."""
    return NamedSharding(mesh, P(BATCH))


def per_device_sharding(mesh: Mesh) -> NamedSharding:
    """For arrays whose first dim counts devices: a word of each to all."""
    return NamedSharding(mesh, P((BATCH, MODEL)))


def replicated_sharding(mesh: Mesh) -> NamedSharding:
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
    return replicated_sharding(mesh)


def wait_for_all(name: str) -> None:
    """Return when all processes have come here; `name` is used once a process.

    Through the coordination service, not the devices: a collective gives up on a late peer within 30 s
    (gloo), and one process may well compile or read that much longer than another.
    """
    processes = set(range(jax.process_count()))
    ocp.multihost.sync_global_processes(name, timeout=BARRIER_SECONDS, processes=processes)
