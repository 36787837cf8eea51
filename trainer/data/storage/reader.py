"""The records that one process needs, fetched ahead of their use and held within a budget of bytes.

The order is known, so a planner walks it ahead of the consumer, window by window: which records this
process takes of each, and which ranges of which shards hold them. A range is freed with its last record.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import google_crc32c
import numpy as np

from trainer.data.order import ProcessStream, WindowKey
from trainer.data.storage.dataset import Dataset
from trainer.data.storage.fetch import Fetcher
from trainer.data.storage.request import RangeRequest
from trainer.data.storage.store import AbandonedError

GAP_BYTES, GAP_RECORDS = 4 << 10, 2
"""What is read along rather than asked for around: a container's own bytes, and up to two unwanted records,
which a run that begins or ends amid a window has many of."""
RANGE_BYTES = 16 << 20
LOOKAHEAD_BATCHES = 64
REREADS = 4


class DamagedRecordError(Exception):
    """A record whose bytes do not match its checksum, however often they are read."""


@dataclass(eq=False)
class _PendingRange:
    """Neighbouring records, read by one request."""

    request: RangeRequest
    payload: "Future[np.ndarray] | None" = None
    remaining: int = 0
    """Records still to be taken."""


@dataclass
class _Window:
    """What is fetched of a window: for each slot that this process takes, the range that holds it."""

    records: np.ndarray
    ranges: dict[int, _PendingRange] = field(default_factory=dict)
    """By slot."""


class MemoryBudget:
    """Bytes that may be held. Who waits for room gets it even so if the consumer waits for just that."""

    def __init__(self, num_bytes: int):
        self._free = num_bytes
        self._changed = threading.Condition()
        self._total = num_bytes
        self._starving = 0
        """Consumers that wait for what is not yet asked for."""
        self._closed = False

    def acquire(self, num_bytes: int) -> bool:
        """Wait for room; False once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._starving > 0 or self._free >= num_bytes)
            self._free -= num_bytes
            return not self._closed

    @property
    def held(self) -> int:
        return self._total - self._free

    def release(self, num_bytes: int) -> None:
        with self._changed:
            self._free += num_bytes
            self._changed.notify_all()

    @contextmanager
    def starving(self) -> Iterator[None]:
        with self._changed:
            self._starving += 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._starving -= 1

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Reader:
    """Random access to the samples of a stream, in about their order. For several threads at once."""

    def __init__(
        self,
        dataset: Dataset,
        stream: ProcessStream,
        fetcher: Fetcher,
        *,
        budget_bytes: int,
        block_starts: np.ndarray | None = None,
    ):
        """With `block_starts`, the (blocks,) first records of blocks, ranges stay within them, to be cached."""
        self._blocks = None if block_starts is None else np.append(block_starts, len(dataset))
        self._dataset, self._stream, self._fetcher = dataset, stream, fetcher
        self._budget = MemoryBudget(budget_bytes)
        self._windows: dict[WindowKey, _Window] = {}
        self._planned = threading.Condition()
        self._error: Exception | None = None
        self._batch = 0
        """Newest batch that the consumer has asked for."""
        self._closing = False
        self._planner = threading.Thread(target=self._plan, name="planner", daemon=True)
        self._planner.start()

    @contextmanager
    def record(self, position: int) -> Iterator[tuple[int, np.ndarray]]:
        """The record at a position of the order, each asked for once: its index, and the image as it came.

        The image is (bytes,) uint8, encoded and unchecked, valid within the block. Raises what fetching
        raises.
        """
        key, slot = self._stream.order.locate(position)
        window = self._window(key, position)
        pending = window.ranges[slot]
        index = int(window.records[slot])
        assert pending.payload is not None
        try:
            yield index, self._image(pending.request, pending.payload.result(), index)
        finally:
            self._release_record(key, window, slot)

    def verified(self, image: np.ndarray, index: int) -> np.ndarray:
        """The image, read again where its checksum does not hold. Raises DamagedRecordError."""
        return image if self._is_intact(image, index) else self.read_one(index)

    def read_one(self, index: int) -> np.ndarray:
        """One record by itself. Raises DamagedRecordError, and what fetching raises."""
        request = self._request(index, index)
        for attempt in range(REREADS):
            image = self._fetcher.submit(request, fresh=attempt > 0).result()
            if self._is_intact(image, index):
                return image
        raise DamagedRecordError(f"the bytes do not match their checksum, {REREADS} times read anew")

    def _is_intact(self, image: np.ndarray, index: int) -> bool:
        whole = bool(google_crc32c.value(image) == self._dataset.records["crc32c"][index])
        self._fetcher.stats.count(checksum_failures=int(not whole))
        return whole

    def metrics(self) -> dict[str, float]:
        return {**self._fetcher.metrics(), "data/memory_mib": self._budget.held / 2**20}

    def close(self) -> None:
        self._budget.close()
        with self._planned:
            self._closing = True
            self._planned.notify_all()
        self._planner.join()
        self._windows.clear()

    def _window(self, key: WindowKey, position: int) -> _Window:
        """The plan of a window, waiting for the planner to come to it."""
        batch = (position - self._stream.start) // self._stream.batch_size
        with self._planned:
            if batch > self._batch:
                self._batch = batch
                self._planned.notify_all()
            if key not in self._windows:
                with self._budget.starving():
                    self._planned.wait_for(lambda: key in self._windows or self._error or self._closing)
            if self._error:
                raise self._error
            if self._closing:
                raise AbandonedError("the reader is closed")
            return self._windows[key]

    def _release_record(self, key: WindowKey, window: _Window, slot: int) -> None:
        with self._planned:
            pending = window.ranges.pop(slot)
            pending.remaining -= 1
            if not window.ranges:
                self._windows.pop(key, None)  # closing has cleared them
        if pending.remaining == 0:
            pending.payload = None
            self._budget.release(pending.request.payload_bytes())

    def _plan(self) -> None:
        try:
            for batch, key in self._stream.windows():
                with self._planned:
                    self._planned.wait_for(lambda: self._closing or batch <= self._batch + LOOKAHEAD_BATCHES)  # noqa: B023
                window, ranges = self._plan_window(key)
                lengths = self._dataset.records["length"][window.records[list(window.ranges)]]
                self._fetcher.stats.count(bytes_used=int(lengths.sum()))
                for pending in ranges:
                    if not self._budget.acquire(pending.request.payload_bytes()):
                        return
                    pending.payload = self._fetcher.submit(pending.request)
                with self._planned:
                    self._windows[key] = window
                    self._planned.notify_all()
        except Exception as e:  # noqa: BLE001 (raised where the window is waited for)
            with self._planned:
                self._error = e
                self._planned.notify_all()

    def _plan_window(self, key: WindowKey) -> tuple[_Window, list[_PendingRange]]:
        order = self._stream.order
        window = _Window(order.records(key))
        slots = np.flatnonzero(self._stream.includes(order.positions(key)))
        slots = slots[np.argsort(window.records[slots])]
        ranges = []
        for group in self._group_neighbours(window.records[slots]):
            first, last = window.records[slots[[group.start, group.stop - 1]]].tolist()
            ranges.append(_PendingRange(self._request(first, last), remaining=len(group)))
            window.ranges |= dict.fromkeys(slots[group.start : group.stop].tolist(), ranges[-1])
        return window, ranges

    def _group_neighbours(self, records: np.ndarray) -> list[range]:
        """Runs of ascending records that are read together."""
        rows = self._dataset.records[records]
        offsets, ends = rows["offset"].astype(np.int64), (rows["offset"] + rows["length"]).astype(np.int64)
        apart = np.diff(self._dataset.shard_of(records)) != 0
        apart |= offsets[1:] - ends[:-1] > np.maximum(GAP_RECORDS * (ends - offsets)[:-1], GAP_BYTES)
        apart |= offsets[1:] // RANGE_BYTES != offsets[:-1] // RANGE_BYTES
        if self._blocks is not None:
            apart |= np.diff(np.searchsorted(self._blocks, records, side="right")) != 0
        cuts = [0, *(np.flatnonzero(apart) + 1).tolist(), len(records)]
        return [range(a, b) for a, b in pairwise(cuts)]

    def _request(self, first: int, last: int) -> RangeRequest:
        """For the records from `first` to `last`, with their block where blocks are cached."""
        block = None
        if self._blocks is not None:
            after = int(np.searchsorted(self._blocks, first, side="right"))
            block = self._dataset.byte_range(int(self._blocks[after - 1]), int(self._blocks[after]) - 1)
        return self._dataset.request(first, last, block)

    def _image(self, request: RangeRequest, payload: np.ndarray, index: int) -> np.ndarray:
        """A record's part of a range."""
        return request.extract(payload, self._request(index, index))
