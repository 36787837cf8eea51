"""`launch data order`: which samples a host will train on, without reading one."""

from collections.abc import Iterator
from itertools import count, islice
from typing import NamedTuple

import numpy as np

from configs.errors import UserError
from configs.schema import RunConfig
from trainer.data.order import Order, ProcessStream, train_order
from trainer.data.storage.dataset import open_dataset


class SampleKey(NamedTuple):
    """One sample of the training stream."""

    position: int
    """Its position in the stream, which goes on from epoch to epoch."""
    shard: str
    record: int
    """Its number in its shard."""
    label: int


def keys(
    config: RunConfig, *, hosts: int, host: int | None, start: int, num_keys: int
) -> Iterator[SampleKey]:
    """The first `num_keys` samples from position `start` on that host `host` of `hosts` reads.

    Where `host` is None, those of all hosts. Raises UserError if the source has no shards or `hosts` does not
    divide the batch.
    """
    path, size = config.data.train.path, config.train.batch_size
    if path is None:
        raise UserError(f"data.source = {config.data.source} has no shards; only `records` has keys to show")
    if size % hosts:
        raise UserError(f"--hosts {hosts} does not divide train.batch_size = {size}")
    dataset = open_dataset(path)
    order = train_order(config, len(dataset), dataset.block_starts())
    for position in islice(_positions(order, size, hosts, host, start), num_keys):
        index = order.index(position)
        shard = int(dataset.shard_of(np.array(index)))
        label = int(dataset.records["label"][index])
        yield SampleKey(
            position, dataset.objects[shard].name, index - int(dataset.shard_starts[shard]), label
        )


def _positions(order: Order, size: int, hosts: int, host: int | None, start: int) -> Iterator[int]:
    if host is None:
        yield from count(start)
    assert host is not None
    # The devices of a host hold neighbouring rows of the batch.
    rows = np.arange(size // hosts) + host * (size // hosts)
    for begin in count(start // size * size, size):
        stream = ProcessStream(order, begin, begin + size, size, rows)
        found = (stream.position(i) for i in range(len(stream)))
        yield from (p for p in found if p is not None and p >= start)
