"""The order of samples: a pure function of (seed, epoch, position), the same for every number of hosts.

Position p of a run is sample p % n of epoch p // n, where n is the number of samples. So the state of the
data is one integer, and a batch may reach over the end of an epoch without dropping or repeating a sample.

`data.shuffle=blocks` shuffles in a way that keeps reads large. In each epoch all blocks are permuted and put
one after another; this sequence is cut into equal lanes. A batch takes samples from all lanes in turn, and
each lane is shuffled within windows. Every one of these steps is a bijection, hence so is the whole.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

import numpy as np

from configs.schema import RunConfig


class WindowKey(NamedTuple):
    """Identifies one window: records of one lane that are shuffled among each other."""

    epoch: int
    lane: int
    window: int


@dataclass(frozen=True)
class Order:
    """An endless order over `num_examples` records, of which each epoch is a permutation."""

    num_examples: int
    seed: int
    shuffle: Literal["blocks", "global", "none"]
    block_starts: np.ndarray | None = None
    """(blocks,) int64: the first record of each block, ascending from 0. Needed for `blocks` alone."""
    lanes: int = 1
    window: int = 1
    """Number of records in a window."""

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """The record at each of `positions`: (n,) int64 for (n,) integers."""
        return np.array([self.index(int(p)) for p in positions], np.int64)

    def index(self, position: int) -> int:
        """The record at one position."""
        key, slot = self.locate(position)
        return int(self._cached_records(key)[slot])

    def locate(self, position: int) -> tuple[WindowKey, int]:
        """The window that a position lies in, and its slot within the window."""
        epoch, i = divmod(position, self.num_examples)
        step, lane = divmod(i, self.lanes)
        window, slot = divmod(step + self._phase(lane), self.window)
        return WindowKey(epoch, lane, window), slot if window else slot - self._phase(lane)

    def positions(self, key: WindowKey) -> np.ndarray:
        """The positions of a window's slots, (slots,) int64."""
        steps = self._steps(key)
        return key.epoch * self.num_examples + key.lane + self.lanes * np.arange(steps.start, steps.stop)

    def records(self, key: WindowKey) -> np.ndarray:
        """The records of a window's slots, (slots,) int64."""
        steps = self._steps(key)
        short, longer = divmod(self.num_examples, self.lanes)
        # Where the lane begins in the sequence: the first `longer` lanes have one record more than the
        # others.
        begin = key.lane * short + min(key.lane, longer)
        records = self._epoch_records(key.epoch, begin + steps.start, begin + steps.stop)
        # The others are shuffled already or not at all, and have windows only as units of reading.
        if self.shuffle == "blocks":
            return records[_permutation(len(records), self.seed, *key)]
        return records

    def _steps(self, key: WindowKey) -> range:
        """The part of its lane that a window covers.

        Lanes are out of phase, so that they do not all begin a new window at once.
        """
        length = -(-(self.num_examples - key.lane) // self.lanes)
        begin = key.window * self.window - self._phase(key.lane)
        return range(max(begin, 0), min(begin + self.window, length))

    def _phase(self, lane: int) -> int:
        return lane * self.window // self.lanes

    def _epoch_records(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Records [start, stop) of an epoch's sequence, before lanes and windows."""
        if self.shuffle == "none":
            return np.arange(start, stop)
        if self.shuffle == "global":
            return self._shuffle_globally(epoch, start, stop)
        starts, sizes, ends = self._permuted_blocks(epoch)
        # Only the blocks that the range touches; the slice below drops what lies before and after it.
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        parts = [np.arange(starts[b], starts[b] + sizes[b]) for b in range(first, last + 1)]
        skipped = start - (ends[first] - sizes[first])
        return np.concatenate(parts)[skipped : skipped + stop - start]

    def _shuffle_globally(self, epoch: int, start: int, stop: int) -> np.ndarray:
        # Not at the top: Grain loads jax, which the other orders do without.
        from grain.experimental import index_shuffle

        top, seed = self.num_examples - 1, epoch_seed(self.seed, epoch)
        # index_shuffle needs two numbers or more.
        if top == 0:
            return np.zeros(stop - start, np.int64)
        return np.array(
            [index_shuffle(i, max_index=top, seed=seed, rounds=4) for i in range(start, stop)], np.int64
        )

    @cached_property
    def _permuted_blocks(self):  # type: ignore[no-untyped-def]
        """A function from an epoch to its permuted blocks: their first records, sizes, and ends in the sequence."""
        assert self.block_starts is not None
        block_starts = self.block_starts
        block_sizes = np.diff(block_starts, append=self.num_examples)

        @lru_cache(maxsize=2)  # a batch may reach into a second epoch
        def permuted(epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            permutation = _permutation(len(block_starts), self.seed, epoch)
            sizes = block_sizes[permutation]
            return block_starts[permutation], sizes, np.cumsum(sizes)

        return permuted

    @cached_property
    def _cached_records(self):  # type: ignore[no-untyped-def]
        # A cache for each Order; lru_cache on a method would keep every Order alive.
        # A batch takes from every lane at once, and threads may be a few windows apart.
        return lru_cache(maxsize=4 * self.lanes)(self.records)


def _hash(*parts: int, num_bytes: int) -> int:
    # Not Python's hash(), which differs from process to process.
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=num_bytes).digest()
    return int.from_bytes(digest, "little")


def epoch_seed(seed: int, epoch: int) -> int:
    """A 32-bit seed for one epoch.

    It is a hash: with seed + epoch, epoch 1 of seed 7 would be epoch 0 of seed 8.
    """
    return _hash(seed, epoch, num_bytes=4)


def _permutation(n: int, *key: int) -> np.ndarray:
    # numpy may change Generator.permutation from one version to the next, but never a raw bit stream (NEP
    # 19).
    return np.argsort(np.random.Philox(key=_hash(*key, num_bytes=16)).random_raw(n), kind="stable")


def train_order(config: RunConfig, num_examples: int, block_starts: np.ndarray | None) -> Order:
    """The order of training. A split without blocks lies in memory, and for it `blocks` means `global`."""
    data, seed = config.data, config.train.seed
    if data.shuffle == "blocks" and block_starts is not None:
        lanes = choose_num_lanes(config.train.batch_size, data.lanes)
        return Order(num_examples, seed, "blocks", block_starts, lanes, data.window)
    window = _mean_block_size(num_examples, block_starts)
    return Order(num_examples, seed, "none" if data.shuffle == "none" else "global", window=window)


def eval_order(config: RunConfig, num_examples: int, block_starts: np.ndarray | None) -> Order:
    """The order of evaluation: as stored, read from as many lanes as in training, so that hosts share few blocks."""
    lanes = choose_num_lanes(config.train.batch_size, config.data.lanes) if block_starts is not None else 1
    return Order(num_examples, 0, "none", lanes=lanes, window=_mean_block_size(num_examples, block_starts))


def _mean_block_size(num_examples: int, block_starts: np.ndarray | None) -> int:
    return 1 if block_starts is None else -(-num_examples // len(block_starts))


def choose_num_lanes(batch_size: int, max_lanes: int) -> int:
    """The number of lanes: a divisor of the batch size with as many factors of two as possible.

    Most runs have a power of two of hosts, and where that divides the lanes, each host reads lanes of its
    own.
    """
    divisors = [d for d in range(1, min(batch_size, max_lanes) + 1) if batch_size % d == 0]
    # d & -d is the largest power of two that divides d.
    return max(divisors, key=lambda d: (d & -d, d))


@dataclass(frozen=True)
class ProcessStream:
    """The part of the stream of samples that one process reads: its rows of each global batch."""

    order: Order
    start: int
    """Position of the first row of the first batch."""
    stop: int
    """Position after the last batch; a multiple of `batch_size` after `start`."""
    batch_size: int
    rows: np.ndarray
    """(rows,) int64: the rows of a batch that this process reads, ascending."""
    limit: int | None = None
    """Positions from this one on are padding; None where the stream is endless."""

    def __len__(self) -> int:
        return (self.stop - self.start) // self.batch_size * len(self.rows)

    def position(self, i: int) -> int | None:
        """The position of the i-th sample that this process reads; None for padding."""
        batch, row = divmod(i, len(self.rows))
        position = self.start + batch * self.batch_size + int(self._offsets[row])
        return position if self.limit is None or position < self.limit else None

    def includes(self, positions: np.ndarray) -> np.ndarray:
        """Whether this process reads each of `positions`: (n,) bool for (n,) integers."""
        inside = (positions >= self.start) & (positions < self.stop)
        if self.limit is not None:
            inside &= positions < self.limit
        return inside & self._is_local[(positions - self.start) % self.batch_size]

    def windows(self) -> Iterator[tuple[int, WindowKey]]:
        """The windows that this process reads, as (batch, window): the first batch that needs the window."""
        order, newest = self.order, np.full(self.order.lanes, -1)
        # Two more than are full, because the phase of a lane may cut one short at either end.
        windows_an_epoch = order.num_examples // order.lanes // order.window + 2
        for batch, begin in enumerate(range(self.start, self.stop, self.batch_size)):
            positions = begin + self._offsets
            if self.limit is not None:
                positions = positions[positions < self.limit]
            epoch, i = np.divmod(positions, order.num_examples)
            step, lane = np.divmod(i, order.lanes)
            # Numbers all windows of a lane across epochs, in the order in which the lane is read.
            turn = epoch * windows_an_epoch + (step + lane * order.window // order.lanes) // order.window
            new = turn > newest[lane]  # a lane's windows come one after another
            for t, in_lane in sorted(set(zip(turn[new].tolist(), lane[new].tolist(), strict=True))):
                newest[in_lane] = t
                yield batch, WindowKey(t // windows_an_epoch, in_lane, t % windows_an_epoch)

    @cached_property
    def _offsets(self) -> np.ndarray:
        """(rows,) int64: where each of this process's rows lies among the positions of a batch.

        Neighbouring rows share a lane. A host holds neighbouring rows, so it reads lanes of its own.
        """
        per_lane = self.batch_size // self.order.lanes
        return self.rows % per_lane * self.order.lanes + self.rows // per_lane

    @cached_property
    def _is_local(self) -> np.ndarray:
        is_local = np.zeros(self.batch_size, bool)
        is_local[self._offsets] = True
        return is_local
