"""Batches: each sample once an epoch, the same batch whatever the mesh and the threads."""

from contextlib import closing

import jax
import numpy as np
import pytest

from tests.trainer.small import config_of
from trainer.data.batches import Batches, eval_batches, local_row_indices, train_batches
from trainer.data.order import train_order
from trainer.data.split import InMemorySplit
from trainer.mesh import batch_sharding, make_mesh


def numbered(length: int) -> InMemorySplit:
    """Samples that say their own index in their label."""
    indices = np.arange(length, dtype=np.int32)
    images = np.broadcast_to((indices % 256).astype(np.uint8)[:, None, None, None], (length, 8, 8, 3))
    return InMemorySplit(images, indices, "numbered")


def ordered(n: int, positions: range) -> list[int]:
    return train_order(config_of(), n, None).indices(np.array(positions)).tolist()


def labels(batches: Batches) -> list[np.ndarray]:
    with closing(batches):
        return [np.asarray(batch.labels) for batch in batches]


def test_batches_follow_the_order_across_the_end_of_an_epoch() -> None:
    config, split = config_of(), numbered(50)
    found = labels(train_batches(config, split, batch_sharding(make_mesh(4, 1)), position=0, steps=5))
    assert np.concatenate(found).tolist() == ordered(50, range(5 * 32))


def test_a_stream_that_begins_in_the_middle_is_the_rest_of_the_whole() -> None:
    config, split, sharding = config_of(), numbered(50), batch_sharding(make_mesh(4, 1))
    whole = labels(train_batches(config, split, sharding, position=0, steps=6))
    rest = labels(train_batches(config, split, sharding, position=4 * 32, steps=2))
    np.testing.assert_array_equal(rest, whole[4:])


@pytest.mark.parametrize(("batch", "model"), [(4, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("threads", [0, 3])
def test_the_global_batch_is_the_same_on_every_mesh(batch: int, model: int, threads: int) -> None:
    config, split = config_of(f"data.read_threads={threads}"), numbered(70)
    found = labels(
        train_batches(config, split, batch_sharding(make_mesh(batch, model)), position=32, steps=2)
    )
    assert np.concatenate(found).tolist() == ordered(70, range(32, 96))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 360])
def test_evaluation_sees_every_sample_once_and_marks_the_rest(length: int) -> None:
    found = np.concatenate(
        labels(eval_batches(config_of(), numbered(length), batch_sharding(make_mesh(4, 1))))
    )
    assert found[found >= 0].tolist() == list(range(length))
    assert len(found) % 32 == 0


def test_a_process_reads_only_the_rows_of_its_devices() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]).reshape(2, 1), ("batch", "model"))
    assert local_row_indices(batch_sharding(mesh), 8).tolist() == list(range(8))
    alone = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("batch", "model"))
    assert local_row_indices(batch_sharding(alone), 8).tolist() == list(range(8))
