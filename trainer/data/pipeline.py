"""The Grain graph: from positions of the order to batches that lie sharded on the devices.

Each process reads just the rows of the global batch that its own devices hold, so that the batch is
the same array whatever the number of processes.
"""

from collections.abc import Callable, Iterator

import grain
import jax
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset
from jax.sharding import NamedSharding

from configs.schema import RunConfig
from trainer.data.order import sample_index
from trainer.data.split import Sample, Split
from trainer.step import Batch


class _HostRows:
    """The samples of this process's rows, batch after batch, as a Grain random-access source."""

    def __init__(self, split: Split, index: Callable[[int], int | None], starts: range, rows: np.ndarray):
        self._split, self._index, self._starts, self._rows = split, index, starts, rows

    def __len__(self) -> int:
        return len(self._starts) * len(self._rows)

    def __getitem__(self, i: int) -> Sample:
        batch, row = divmod(int(i), len(self._rows))
        index = self._index(self._starts[batch] + int(self._rows[row]))
        if index is None:
            return Sample(np.zeros_like(self._split[0].image), np.array(-1, np.int32))
        return self._split[index]

    def __repr__(self) -> str:
        return f"HostRows({len(self)} samples)"


def train_batches(
    config: RunConfig, split: Split, sharding: NamedSharding, *, position: int, steps: int
) -> Iterator[Batch]:
    """`steps` training batches from `position` on, shuffled anew each epoch."""

    def index(p: int) -> int:
        return sample_index(p, num_examples=len(split), seed=config.train.seed)

    size = config.train.batch_size
    return _batches(config, split, index, range(position, position + steps * size, size), sharding)


def eval_batches(config: RunConfig, split: Split, sharding: NamedSharding) -> Iterator[Batch]:
    """The whole split in order, once; the last batch is filled up with label -1."""

    def index(p: int) -> int | None:
        return p if p < len(split) else None

    return _batches(config, split, index, range(0, len(split), config.train.batch_size), sharding)


def _batches(
    config: RunConfig,
    split: Split,
    index: Callable[[int], int | None],
    starts: range,
    sharding: NamedSharding,
) -> Iterator[Batch]:
    size = config.train.batch_size
    rows = local_rows(sharding, size)
    offsets = {int(row): i for i, row in enumerate(rows)}

    def to_devices(local: Sample) -> Batch:
        def place(x: np.ndarray) -> jax.Array:
            def shard(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None
                start, stop, _ = index[0].indices(size)
                return x[offsets[start] : offsets[start] + stop - start]

            return jax.make_array_from_callback((size, *x.shape[1:]), sharding, shard)

        return Batch(place(local.image), place(local.label))

    ready = config.data.prefetch_batches
    read = grain.ReadOptions(
        num_threads=config.data.read_threads,
        prefetch_buffer_size=ready * len(rows) if config.data.read_threads else 0,
    )
    # The read buffer counts elements, so batches are made after it.
    dataset = (
        grain.MapDataset.source(_HostRows(split, index, starts, rows))
        .to_iter_dataset(read)
        .batch(len(rows))
        .map(to_devices)
    )
    return iter(ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=ready))


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Rows of a global batch that this process's devices hold, ascending."""
    slices = {
        index[0].indices(batch_size)[:2]
        for index in sharding.addressable_devices_indices_map((batch_size,)).values()
        if index is not None
    }
    return np.concatenate([np.arange(start, stop) for start, stop in sorted(slices)])
