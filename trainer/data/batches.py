"""The Grain graph: from positions in the order of samples to batches that are sharded over the devices.

Each process reads only those rows of the global batch that its own devices hold, so the global batch is the
same array whatever the number of processes.
"""

from collections.abc import Iterator

import grain
import jax
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset
from jax.sharding import NamedSharding

from configs.schema import RunConfig
from trainer.data.order import ProcessStream, eval_order, train_order
from trainer.data.split import Sample, Samples, Split
from trainer.step import Batch


class Batches(Iterator[Batch]):
    """Global batches on the devices, made ahead of their use by threads. Close it to end the threads."""

    def __init__(self, config: RunConfig, samples: Samples, rows: np.ndarray, sharding: NamedSharding):
        self._samples = samples
        self._made, self._used = 0, 0
        size = config.train.batch_size
        # The rows of this process need not be neighbours, so each shard is looked up by its first row.
        offsets = {int(row): i for i, row in enumerate(rows)}

        def to_devices(local: Sample) -> Batch:
            def to_global(x: np.ndarray) -> jax.Array:
                # Called once for each device of this process; a slice of the local batch is no copy.
                def shard(index: tuple[slice, ...] | None) -> np.ndarray:
                    assert index is not None
                    start, stop, _ = index[0].indices(size)
                    return x[offsets[start] : offsets[start] + stop - start]

                return jax.make_array_from_callback((size, *x.shape[1:]), sharding, shard)

            batch = Batch(to_global(local.image), to_global(local.label))
            self._made += 1
            return batch

        ready = config.data.prefetch_batches
        read = grain.ReadOptions(
            num_threads=config.data.read_threads,
            prefetch_buffer_size=ready * len(rows) if config.data.read_threads else 0,
        )
        # Batches are made after the read buffer, which counts elements: up to here each is one sample.
        dataset = grain.MapDataset.source(samples).to_iter_dataset(read).batch(len(rows)).map(to_devices)
        self._iterator = iter(ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=ready))
        self._iterator.start_prefetch()

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self._used += 1
        return batch

    def metrics(self) -> dict[str, float]:
        """Figures on the input, for the log, by TensorBoard's names."""
        return {"data/ready_batches": self._made - self._used, **self._samples.metrics()}

    def close(self) -> None:
        """End the threads; batches that are already made are dropped."""
        # The samples first: a thread that waits for bytes would keep the iterator from closing.
        self._samples.close()
        self._iterator.close()


def train_batches(
    config: RunConfig, split: Split, sharding: NamedSharding, *, position: int, steps: int
) -> Batches:
    """`steps` training batches from `position` in the order on, shuffled anew in each epoch."""
    size = config.train.batch_size
    rows = local_row_indices(sharding, size)
    order = train_order(config, len(split), split.block_starts)
    stream = ProcessStream(order, position, position + steps * size, size, rows)
    return Batches(config, split.samples(stream, train=True), rows, sharding)


def eval_batches(config: RunConfig, split: Split, sharding: NamedSharding) -> Batches:
    """The whole split once. The last batch is filled up with rows of label -1."""
    size = config.train.batch_size
    rows = local_row_indices(sharding, size)
    order = eval_order(config, len(split), split.block_starts)
    padded = -(-len(split) // size) * size
    stream = ProcessStream(order, 0, padded, size, rows, limit=len(split))
    return Batches(config, split.samples(stream, train=False), rows, sharding)


def local_row_indices(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """The rows of a global batch that this process's devices hold: (rows,) int64, ascending."""
    slices = {
        index[0].indices(batch_size)[:2]
        for index in sharding.addressable_devices_indices_map((batch_size,)).values()
        if index is not None
    }
    return np.concatenate([np.arange(start, stop) for start, stop in sorted(slices)])
