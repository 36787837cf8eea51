"""Every mesh trains the same network, and no device ever holds more than its share of it."""

import random
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from configs.architectures import parameter_shapes, share_of_device
from configs.errors import UserError
from tests.trainer.small import shared
from trainer.mesh import make_mesh, weight_sharding

GLOBAL = ("model.batch_norm=global", "schedule.name=constant", "optimizer.learning_rate=0.05")


@dataclass(frozen=True)
class Device:
    """What a mesh looks at in a device."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"
    coords: tuple[int, ...] = ()
    core_on_chip: int = 0


def gpus(nodes: int, per_node: int) -> list[Device]:
    """Those of nodes that share no NVLink domain: each is a slice, and the order of slices is not that of ids."""
    return [Device(n * per_node + k, n, nodes - 1 - n) for n in range(nodes) for k in range(per_node)]


def tpus(num_slices: int, *topology: int, kind: str = "TPU v4") -> list[Device]:
    """Processes of 2×2 chips, numbered against the order of their slices, as a TPU runtime may number them."""
    found: list[Device] = []
    for s in range(num_slices):
        hosts: dict[tuple[int, ...], int] = {}
        for x, y, z in np.ndindex(*topology, *[1] * (3 - len(topology))):
            host = hosts.setdefault((x // 2, y // 2, z), len(hosts))
            chips_of_slice = int(np.prod(topology))
            process = (num_slices - 1 - s) * (chips_of_slice // 4) + host
            found.append(Device(len(found), process, s, "tpu", kind, (x, y, z)))
    return found


@pytest.mark.parametrize(
    ("devices", "model"),
    [
        (gpus(1, 8), 1),
        (gpus(4, 8), 8),
        (gpus(64, 8), 2),
        (gpus(3, 6), 3),
        (gpus(5, 1), 1),
        (
            [*gpus(1, 12), *(Device(n, n // 4, 1) for n in range(12, 20))],
            4,
        ),  # three nodes of a rack, and two of another
        (tpus(1, 2, 2, 4), 4),
        (tpus(2, 2, 2, 4), 1),
        (tpus(2, 2, 2, 4), 16),
        (tpus(3, 4, 4, 4), 2),  # 2 is no product of whole axes of 4×4×4
        (tpus(2, 4, 4, 12), 8),
        (tpus(4, 4, 4, kind="TPU v6 lite"), 2),
        (tpus(2, 4, 8, kind="TPU v5 lite"), 8),
    ],
    ids=str,
)
def test_the_batch_axis_goes_over_slices_first_and_the_model_axis_stays_in_one(devices, model):
    shuffled = random.Random(0).sample(devices, len(devices))
    mesh = make_mesh(len(devices) // model, model, shuffled)
    assert set(mesh.devices.flat) == set(devices)
    slices = np.vectorize(lambda d: d.slice_index)(mesh.devices)
    assert (slices == slices[:, :1]).all()
    assert (np.diff(slices[:, 0]) >= 0).all()  # each slice has one run of rows
    assert np.array_equal(mesh.devices, make_mesh(len(devices) // model, model, devices).devices)


@pytest.mark.parametrize(("platform", "order"), [("cpu", [2, 3, 0, 1]), ("gpu", [0, 1, 2, 3])])
def test_within_a_slice_they_lie_by_process_and_id_but_gpus_as_xla_numbers_them(platform, order):
    devices = [Device(n, process, 0, platform, platform) for n, process in [(3, 0), (1, 1), (2, 0), (0, 1)]]
    assert [d.id for d in make_mesh(4, 1, devices).devices.flat] == order


@pytest.mark.parametrize(
    ("devices", "model", "told"),
    [
        (gpus(4, 8), 16, "mesh.model = 16: the run has 4 slices (hosts with an interconnect of their own) of 8 devices"),
        ([*gpus(1, 8), Device(9, 1, 1)], 2, "2 slices (hosts with an interconnect of their own) of 1 or 8 devices"),
    ],
)  # fmt: skip
def test_a_mesh_that_cannot_be_laid_so_is_refused(devices, model, told):
    with pytest.raises(UserError) as e:
        make_mesh(len(devices) // model, model, devices)
    assert told in str(e.value)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((3, 3, 16, 32), P(None, None, None, "model")),
        ((512, 1000), P(None, "model")),
        ((512, 10), P("model")),  # 4 does not divide 10 classes: the features are split instead
        ((64,), P("model")),
        ((10,), P()),
        ((), P()),
    ],
)
def test_output_channels_lie_over_the_model_axis(shape: tuple[int, ...], spec: P) -> None:
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert weight_sharding(make_mesh(1, 4), leaf).spec == spec


def losses(batch: int, model: int) -> list[float]:
    t = shared(f"mesh.batch={batch}", f"mesh.model={model}", *GLOBAL)
    step, leaves = t.step, jax.tree.leaves(t.fresh())
    found = []
    for i in range(10):
        leaves, metrics = step(leaves, t.batch(i), t.requests())
        found.append(float(metrics[0]))
    return found


def test_4x1_2x2_and_1x4_give_the_same_losses_over_10_steps() -> None:
    reference = losses(4, 1)
    assert max(reference) - min(reference) > 0.01  # it learns, so equality means something
    np.testing.assert_allclose(losses(2, 2), reference, atol=1e-4)
    np.testing.assert_allclose(losses(1, 4), reference, atol=1e-4)


def test_weights_and_optimizer_state_are_created_in_shards() -> None:
    t = shared("mesh.batch=1", "mesh.model=4")
    state = t.init()
    kernel = state.params["stages.0.0.convs.0.kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(3, 3, 4, 1)}
    held = [sum(s.data.nbytes for leaf in jax.tree.leaves(state) for s in leaf.addressable_shards if s.device == d)
            for d in jax.devices()]  # fmt: skip
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    model = t.config.model
    shapes = parameter_shapes(model.name, num_classes=model.num_classes, width=model.width, stem=model.stem)
    params = sum(s.data.size for leaf in state.params.values() for s in leaf.addressable_shards[:1])
    assert params == share_of_device(shapes, 4) * sum(
        leaf.size for leaf in state.params.values()
    )  # as planned
    assert max(held) < 0.27 * whole  # a quarter, and the few leaves too short to split


def test_no_program_that_creates_the_state_holds_all_of_it_on_one_device() -> None:
    t = shared("mesh.batch=1", "mesh.model=4", "model.width=16")
    shardings = jax.tree.map(lambda leaf: leaf.sharding, t.abstract)
    from trainer.state import _build_state

    compiled = jax.jit(
        lambda: _build_state(t.config, t.network, t.optimizer), out_shardings=shardings
    ).lower().compile()  # fmt: skip
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(t.abstract))
    assert compiled.memory_analysis().output_size_in_bytes < 0.3 * whole
