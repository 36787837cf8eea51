"""The batch×model mesh: the axis that each array is sharded over, and a barrier for the processes that share
the mesh.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from configs.architectures import sharded_dim
from configs.errors import UserError

BATCH, MODEL = "batch", "model"
BARRIER_SECONDS = 1800


def make_mesh(batch: int, model: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices of the run, all unless told, as a (batch, model) mesh in an order that suits their interconnect.

    The batch axis goes over the slices first, so that each row of the model axis lies within one. A slice is what a
    fast interconnect joins: a TPU slice, the GPUs of a node or of an NVLink domain, the CPU devices of a host. Within
    a TPU slice the devices are laid along its torus, elsewhere by process and id, and GPUs by id alone, since XLA
    numbers them along their nodes.
    Slices may be unequal, as where SLURM gives five nodes of two racks. Raises UserError where `model` does not divide
    the devices of every slice.
    """
    by_slice: dict[int, list[jax.Device]] = {}
    for device in sorted(devices or jax.devices(), key=lambda d: (_slice_index(d), d.process_index, d.id)):
        by_slice.setdefault(_slice_index(device), []).append(device)
    sizes = sorted({len(of_slice) for of_slice in by_slice.values()})
    if any(size % model for size in sizes):
        raise UserError(
            f"mesh.model = {model}: the run has {len(by_slice)} slices (hosts with an interconnect of their own) of "
            f"{' or '.join(map(str, sizes))} devices, and each must be a whole number of model axes; use a mesh.model "
            "that divides the devices of every slice"
        )
    # jax.make_mesh refuses more than one slice, and so does this function: it is called for each.
    grids = [
        mesh_utils.create_device_mesh((len(d) // model, model), d, allow_split_physical_axes=True)
        for d in by_slice.values()
    ]
    # Auto: the compiler propagates the shardings of a step's inputs through it, so networks need no
    # annotations.
    return Mesh(np.concatenate(grids).reshape(batch, model), (BATCH, MODEL), axis_types=(AxisType.Auto,) * 2)


def _slice_index(device: jax.Device) -> int:
    # Absent on some platforms, and on TPU where there is one slice.
    return getattr(device, "slice_index", 0)


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
    batch norm is (channels,)), and optimizer state has the shapes of the weights. `sharded_dim` has the rule.
    Integers, and what cannot be split, are replicated.
    """
    is_weight = jnp.issubdtype(leaf.dtype, jnp.floating)
    dim = sharded_dim(leaf.shape, mesh.shape[MODEL]) if is_weight else None
    return replicated_sharding(mesh) if dim is None else NamedSharding(mesh, P(*[None] * dim, MODEL))


def wait_for_all(name: str) -> None:
    """Block until all processes have called this with the same `name`, which a process may use once.

    The barrier goes through JAX's coordination service and not over the devices: a collective gives up on a
    late peer within 30 s (gloo), but one process may compile or read that much longer than another. Raises
    after 30 minutes.
    """
    processes = set(range(jax.process_count()))
    ocp.multihost.sync_global_processes(name, timeout=BARRIER_SECONDS, processes=processes)
