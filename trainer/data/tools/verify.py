"""`launch data verify`: whether each record matches its checksum, and whether it decodes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import google_crc32c
import numpy as np

from trainer.data.storage.dataset import Dataset
from trainer.data.storage.formats import FORMATS
from trainer.data.storage.request import RangeRequest
from trainer.data.storage.store import Object, Store, open_store
from trainer.data.tools import parallel
from trainer.data.tools.shards import RANGE_BYTES, stream


@dataclass(frozen=True)
class BadRecord:
    """A record that training could not use."""

    shard: str
    record: int
    """Its number in its shard."""
    offset: int
    """Where it begins in its shard, in bytes."""
    reason: str


@dataclass(frozen=True)
class _ShardTask:
    """All that a process needs to verify one shard."""

    url: str
    format: str
    obj: Object
    rows: np.ndarray
    """The shard's rows of the table, (records,) RECORD_DTYPE."""


def verify(
    dataset: Dataset, *, decode: bool, jobs: int, progress: Callable[[int, int], None]
) -> list[BadRecord]:
    """Read all records and return the bad ones, in order.

    `progress` is called with the records and the bytes of each shard as it is done.
    """
    manifest, first = dataset.manifest, dataset.shard_starts
    tasks = [
        _ShardTask(dataset.store.url, manifest.format, obj, dataset.records[first[i] : first[i + 1]])
        for i, obj in enumerate(dataset.objects)
    ]
    bad = []
    for num_records, num_bytes, found in parallel.run(partial(_verify_shard, decode), tasks, jobs):
        bad += found
        progress(num_records, num_bytes)
    return sorted(bad, key=lambda b: (b.shard, b.record))


def _verify_shard(decode: bool, task: _ShardTask) -> tuple[int, int, list[BadRecord]]:
    """The number of records and of bytes of one shard, and its bad records."""
    rows, store = task.rows, open_store(task.url)
    bad = []
    runs = list(_neighbours(rows))
    # Large ranges for speed; single records are cut out of them below.
    ranges = [_request(store, task, rows[a], rows[b - 1]) for a, b in runs]
    for (a, b), outer, payload in zip(runs, ranges, stream(ranges), strict=True):
        for i in range(a, b):
            inner = _request(store, task, rows[i], rows[i])
            image = outer.extract(payload, inner).tobytes()
            if reason := find_fault(image, int(rows["crc32c"][i]), decode):
                bad.append(BadRecord(task.obj.name, i, inner.offset, reason))
    return len(rows), task.obj.size, bad


def _neighbours(rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Neighbouring records that are read by one request, as (first, after the last)."""
    begin = 0
    ends = rows["offset"] + rows["length"]
    for i in range(1, len(rows) + 1):
        if i == len(rows) or ends[i] - rows["offset"][begin] > RANGE_BYTES:
            yield begin, i
            begin = i


def _request(store: Store, task: _ShardTask, first: np.void, last: np.void) -> RangeRequest:
    """The request for the records from `first` to `last`."""
    offset, end = int(first["offset"]), int(last["offset"]) + int(last["length"])
    return RangeRequest(store, task.obj, offset, end - offset, FORMATS[task.format].FRAMING)


def find_fault(image: bytes, crc32c: int, decode: bool) -> str | None:
    """What is wrong with an image, or None."""
    actual = google_crc32c.value(image)
    if actual != crc32c:
        return f"its crc32c is {actual:08x}, not {crc32c:08x}"
    if decode:
        # Not at the top: reading without --decode needs no image library.
        from trainer.data.pixels.decode import decode as decoded

        try:
            decoded(image)
        except ValueError as e:
            return f"it does not decode: {e}"
    return None
