"""Every mesh trains the same network, and no device ever holds more than its share of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.trainer.small import shared
from trainer.mesh import make_mesh, weight_sharding

GLOBAL = ("model.batch_norm=global", "schedule.name=constant", "optimizer.learning_rate=0.05")


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
