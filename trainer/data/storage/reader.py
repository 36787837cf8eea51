"""The records that one process needs, fetched ahead of their use and held within a budget of memory.

The order of samples is known, so a planner thread walks through it ahead of the consumer, window by window,
and finds which records this process reads and which ranges of which shards hold them. A range is freed with
its last record.
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
"""A gap this small between two records is read along with them, rather than split into two requests.

Such gaps are bytes of the container, and records that a run does not need of a window in which it begins or
ends.
"""
RANGE_BYTES = 16 << 20
"""A request reads hardly more than this."""
LOOKAHEAD_BATCHES = 64
"""The planner stays at most this far ahead of the consumer."""
REREADS = 4
"""A record that does not match its checksum is fetched again this often."""


class DamagedRecordError(Exception):
    """A record does not match its checksum, even after it was fetched several times."""


@dataclass(eq=False)
class _PendingRange:
    """Neighbouring records, read by one request."""

    request: RangeRequest
    payload: "Future[np.ndarray] | None" = None
    """The bytes without framing, uint8; None before they are requested and after they are freed."""
    remaining: int = 0
    """Number of records that the consumer has not yet taken."""


@dataclass
class _Window:
    """What is fetched of a window."""

    records: np.ndarray
    """(slots,) int64: the record of each slot."""
    ranges: dict[int, _PendingRange] = field(default_factory=dict)
    """For each slot that this process reads, the range that holds its record."""


class MemoryBudget:
    """The number of bytes that may be held at once.

    The budget is exceeded where the consumer waits for exactly what the budget would keep from being fetched.
    """

    def __init__(self, num_bytes: int):
        self._free = num_bytes
        self._changed = threading.Condition()
        self._total = num_bytes
        self._starving = 0
        """Number of consumers that wait for a window which is not yet requested."""
        self._closed = False

    def acquire(self, num_bytes: int) -> bool:
        """Wait for room and take it. Returns False once the budget is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._starving > 0 or self._free >= num_bytes)
            self._free -= num_bytes
            return not self._closed

    @property
    def held(self) -> int:
        """Bytes held now."""
        return self._total - self._free

    def release(self, num_bytes: int) -> None:
        """Give back room for `num_bytes`."""
        with self._changed:
            self._free += num_bytes
            self._changed.notify_all()

    @contextmanager
    def starving(self) -> Iterator[None]:
        """While the context lasts, a consumer waits for a window which is not yet requested."""
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
    """Random access to the samples of one process, for several threads that take them in about their order."""

    def __init__(
        self,
        dataset: Dataset,
        stream: ProcessStream,
        fetcher: Fetcher,
        *,
        budget_bytes: int,
        block_starts: np.ndarray | None = None,
    ):
        """Start the planner.

        With `block_starts`, (blocks,) int64, no request crosses a block, so that blocks can be cached.
        """
        self._blocks = None if block_starts is None else np.append(block_starts, len(dataset))
        self._dataset, self._stream, self._fetcher = dataset, stream, fetcher
        self._budget = MemoryBudget(budget_bytes)
        self._windows: dict[WindowKey, _Window] = {}
        self._planned = threading.Condition()
        self._error: Exception | None = None
        self._batch = 0
        """The newest batch that the consumer has asked for."""
        self._closing = False
        self._planner = threading.Thread(target=self._plan, name="planner", daemon=True)
        self._planner.start()

    @contextmanager
    def record(self, position: int) -> Iterator[tuple[int, np.ndarray]]:
        """The record at a position of the order: its number and its image. Each position is asked for once.

        The image is (bytes,) uint8, encoded, not verified, and valid until the context ends. Raises what
        fetching raises.
        """
        key, slot = self._stream.order.locate(position)
        window = self._window(key, position)
        pending = window.ranges[slot]
        index = int(window.records[slot])
        assert pending.payload is not None
        try:
            yield index, pending.request.extract(pending.payload.result(), self._request(index, index))
        finally:
            # Even after an error, or the budget would lose these bytes for good.
            self._release_record(key, window, slot)

    def verified(self, image: np.ndarray, index: int) -> np.ndarray:
        """The image, fetched again if it does not match its checksum. Raises DamagedRecordError."""
        return image if self._is_intact(image, index) else self.read_one(index)

    def read_one(self, index: int) -> np.ndarray:
        """Read a single record. Raises DamagedRecordError, and what fetching raises."""
        request = self._request(index, index)
        for attempt in range(REREADS):
            # The first time from the cache, if it has the record; a damaged file there is then replaced.
            image = self._fetcher.submit(request, fresh=attempt > 0).result()
            if self._is_intact(image, index):
                return image
        raise DamagedRecordError(f"the bytes do not match their checksum, {REREADS} times read anew")

    def _is_intact(self, image: np.ndarray, index: int) -> bool:
        whole = bool(google_crc32c.value(image) == self._dataset.records["crc32c"][index])
        self._fetcher.stats.count(checksum_failures=int(not whole))
        return whole

    def metrics(self) -> dict[str, float]:
        """Figures on the reading, by TensorBoard's names."""
        return {**self._fetcher.metrics(), "data/memory_mib": self._budget.held / 2**20}

    def close(self) -> None:
        """End the planner. Consumers that wait get AbandonedError."""
        # The budget first, because the planner may be waiting for room in it.
        self._budget.close()
        with self._planned:
            self._closing = True
            self._planned.notify_all()
        self._planner.join()
        self._windows.clear()

    def _window(self, key: WindowKey, position: int) -> _Window:
        """The plan of a window, once the planner has come to it. Raises what the planner has met."""
        batch = (position - self._stream.start) // self._stream.batch_size
        with self._planned:
            if batch > self._batch:
                self._batch = batch
                self._planned.notify_all()
            if key not in self._windows:
                # The consumer waits for a window that is not requested. If the budget is full, the planner
                # may exceed it now; otherwise the two would wait for each other.
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
                self._windows.pop(key, None)  # missing after close(), which clears them
        if pending.remaining == 0:
            pending.payload = None
            self._budget.release(pending.request.payload_bytes())

    def _plan(self) -> None:
        """The planner thread: request the ranges of each window, as far as lookahead and budget allow."""
        try:
            for batch, key in self._stream.windows():
                with self._planned:
                    self._planned.wait_for(lambda: self._closing or batch <= self._batch + LOOKAHEAD_BATCHES)  # noqa: B023
                # Which bytes are used is known as soon as they are planned.
                window, ranges = self._plan_window(key)
                lengths = self._dataset.records["length"][window.records[list(window.ranges)]]
                self._fetcher.stats.count(bytes_used=int(lengths.sum()))
                for pending in ranges:
                    # Without holding the lock, which the consumers need to free what this waits for.
                    if not self._budget.acquire(pending.request.payload_bytes()):
                        return
                    pending.payload = self._fetcher.submit(pending.request)
                with self._planned:
                    self._windows[key] = window
                    self._planned.notify_all()
        except Exception as e:  # noqa: BLE001 (the consumer raises it)
            with self._planned:
                self._error = e
                self._planned.notify_all()

    def _plan_window(self, key: WindowKey) -> tuple[_Window, list[_PendingRange]]:
        """A window, and the ranges that hold the records which this process reads of it."""
        order = self._stream.order
        window = _Window(order.records(key))
        slots = np.flatnonzero(self._stream.includes(order.positions(key)))
        # By place in storage, so that neighbours there become neighbours here.
        slots = slots[np.argsort(window.records[slots])]
        ranges = []
        for group in self._group_neighbours(window.records[slots]):
            first, last = window.records[slots[[group.start, group.stop - 1]]].tolist()
            ranges.append(_PendingRange(self._request(first, last), remaining=len(group)))
            window.ranges |= dict.fromkeys(slots[group.start : group.stop].tolist(), ranges[-1])
        return window, ranges

    def _group_neighbours(self, records: np.ndarray) -> list[range]:
        """Split ascending records into groups that are read by one request each."""
        rows = self._dataset.records[records]
        # Signed, because differences of unsigned integers would wrap around.
        offsets, ends = rows["offset"].astype(np.int64), (rows["offset"] + rows["length"]).astype(np.int64)
        # One request cannot reach from one shard into the next.
        apart = np.diff(self._dataset.shard_of(records)) != 0
        apart |= offsets[1:] - ends[:-1] > np.maximum(GAP_RECORDS * (ends - offsets)[:-1], GAP_BYTES)
        # Cutting at fixed multiples bounds the size of every request.
        apart |= offsets[1:] // RANGE_BYTES != offsets[:-1] // RANGE_BYTES
        if self._blocks is not None:
            apart |= np.diff(np.searchsorted(self._blocks, records, side="right")) != 0
        cuts = [0, *(np.flatnonzero(apart) + 1).tolist(), len(records)]
        return [range(a, b) for a, b in pairwise(cuts)]

    def _request(self, first: int, last: int) -> RangeRequest:
        """The request for the records from `first` to `last`, with their block where blocks are cached."""
        block = None
        if self._blocks is not None:
            after = int(np.searchsorted(self._blocks, first, side="right"))
            block = self._dataset.byte_range(int(self._blocks[after - 1]), int(self._blocks[after]) - 1)
        return self._dataset.request(first, last, block)
