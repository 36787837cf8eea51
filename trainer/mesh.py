"""The batch×model mesh: the axis that each array is sharded over, and a barrier for the processes that share
the mesh.
"""

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH, MODEL = "batch", "model"
BARRIER_SECONDS = 1800


def make_mesh(batch: int, model: int) -> Mesh:
    """All devices of the run as a (batch, model) mesh, in an order that suits their interconnect."""
    # Auto: the compiler propagates the shardings of a step's inputs through it, so networks need no
    # annotations.
    return jax.make_mesh((batch, model), (BATCH, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For arrays whose first dim is the global batch: split over the batch axis."""
    return NamedSharding(mesh, P(BATCH))


def per_device_sharding(mesh: Mesh) -> NamedSharding:
    """For arrays whose first dim is the number of devices: one row on each device."""
    return NamedSharding(mesh, P((BATCH, MODEL)))


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """For arrays of which every device holds a whole copy."""
    return NamedSharding(mesh, P())


def weight_sharding(mesh: Mesh, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    """The sharding of one leaf of the train state: its output channels are split over the model axis.

    The last dim of every float leaf is its output channels (kernels are HWIO, the classifier is (in, out),
    batch norm is (channels,)), and optimizer state has the shapes of the weights. If the size of the model
    axis does not divide the last dim, as 4 devices do not divide 10 classes, the dim before it is split
    instead. Scalars, integers and vectors too short to split are replicated.
    """
    size = mesh.shape[MODEL]
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        # Channels only. If the height or width of a kernel were split, each convolution would need its
        # neighbour's part.
        for dim in range(leaf.ndim - 1, max(leaf.ndim - 3, -1), -1):
            if leaf.shape[dim] % size == 0:
                return NamedSharding(mesh, P(*[None] * dim, MODEL))
    return replicated_sharding(mesh)


def wait_for_all(name: str) -> None:
    """Block until all processes have called this with the same `name`, which a process may use once.

    The barrier goes through JAX's coordination service and not over the devices: a collective gives up on a
    late peer within 30 s (gloo), but one process may compile or read that much longer than another. Raises
    after 30 minutes.
    """
    processes = set(range(jax.process_count()))
    ocp.multihost.sync_global_processes(name, timeout=BARRIER_SECONDS, processes=processes)
