"""Ranges of objects, fetched by a pool of threads in spite of what storage does: throttling, broken and slow
connections, and the occasional request that hangs.

A request that fails is repeated after a random wait ("full jitter", AWS Architecture Blog, "Exponential
Backoff And Jitter"). One that is slower than most gets a second attempt beside it, and the first to finish
counts ("hedged requests", Dean & Barroso, "The Tail at Scale", 2013); at most a twentieth of all requests do.
When the service throttles, half as many requests run at once.
"""

import math
import random
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from configs.google import READ_SECONDS, UnreachableError
from trainer.data.storage.cache import BlockCache
from trainer.data.storage.request import RangeRequest
from trainer.data.storage.store import CONNECTIONS, AbandonedError, TransientError

RETRY_SECONDS = 60.0
"""A request is given up when it has failed for this long."""
MIN_WAIT_SECONDS, MAX_WAIT_SECONDS = 0.1, 8.0
"""Bounds of the wait before a repetition."""
HEDGE_SHARE = 0.05
"""At most this share of all requests is hedged."""
MIN_HEDGE_SECONDS = 0.05
"""No request is hedged before this age."""
MIN_BYTES_PER_SECOND = 64 << 10
"""A request below this rate is given up, even if a byte arrives now and then."""
SLOW_BYTES_PER_SECOND = 25e6 / 3
"""A request below this rate may be hedged, once it is also slower than 95 % of those before."""
INITIAL_CONNECTIONS = 8
"""Number of requests that run at once in the beginning."""
COUNTS = (
    "data/requests",
    "data/retries",
    "data/throttled",
    "data/hedges",
    "data/hedges_won",
    "data/checksum_failures",
    "data/bytes_fetched",
)
"""The counters in the log, by TensorBoard's names."""


class FetchStats:
    """Counters and times of all threads of a process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        # Only the newest, so that the percentiles follow the service as it changes during the day.
        self._seconds: deque[float] = deque(maxlen=1000)

    def count(self, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)

    def add_seconds(self, seconds: float) -> None:
        """Record how long a request took."""
        with self._lock:
            self._seconds.append(seconds)

    def percentile(self, q: float) -> float:
        """The q-th percentile of the seconds that the last 1,000 requests took; 0 before the first."""
        with self._lock:
            return float(np.percentile(self._seconds, q)) if self._seconds else 0.0

    def __getitem__(self, name: str) -> int:
        with self._lock:
            return self._counts[name]


class ConcurrencyLimiter:
    """Limits how many requests run at once (AIMD).

    Each round that succeeds allows one more, throttling halves the number.
    """

    def __init__(self, most: int = CONNECTIONS):
        self._most = most
        self._limit = float(min(INITIAL_CONNECTIONS, most))
        self._running = 0
        self._lowered_at = -math.inf
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._running < int(self._limit))
            self._running += 1

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        with self._changed:
            self._running -= 1
            if error is None:
                # After `limit` successes, which is a round, this adds up to one more.
                self._limit = min(self._limit + 1 / self._limit, self._most)
            elif getattr(error, "throttled", False) and time.monotonic() - self._lowered_at > 1.0:
                # Halve at most once a second: the requests already on their way will be throttled, too.
                self._limit, self._lowered_at = max(self._limit / 2, 1.0), time.monotonic()
            self._changed.notify_all()

    @property
    def limit(self) -> int:
        """The number of requests that may run at once now."""
        return int(self._limit)


@dataclass(eq=False)
class _Race:
    """One request and its one or two attempts at a time: the first attempt to complete wins."""

    request: RangeRequest
    attempt_started: float = math.inf
    """When the newest regular attempt was sent; infinite while it waits to be repeated."""
    is_hedged: bool = False
    """Whether a second attempt has been sent beside it."""
    result: "Future[np.ndarray]" = field(default_factory=Future)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def win(self, payload: np.ndarray) -> bool:
        """Set the result, unless the other attempt has. Returns whether this attempt won."""
        with self.lock:
            if self.result.done():
                return False
            self.result.set_result(payload)
            return True

    def fail(self, error: Exception) -> None:
        """Set an error as the result, unless there is a result."""
        with self.lock:
            if not self.result.done():
                self.result.set_exception(error)


class Fetcher:
    """The pool of connections of a process, for training and evaluation alike."""

    def __init__(
        self,
        *,
        cache: BlockCache | None = None,
        retry_seconds: float = RETRY_SECONDS,
        connections: int = CONNECTIONS,
    ):
        self.stats = FetchStats()
        self._cache = cache
        self._fetching_blocks: dict[RangeRequest, Future[np.ndarray]] = {}
        self.limiter = ConcurrencyLimiter(connections)
        self._retry_seconds = retry_seconds
        self._pool = ThreadPoolExecutor(connections, "fetch")
        # A pool of their own, or second attempts would queue behind the requests that they should overtake.
        self._hedges = ThreadPoolExecutor(max(connections // 4, 1), "hedge")
        self._races: set[_Race] = set()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._hedge_slow_requests, name="hedging", daemon=True)
        self._watcher.start()

    def submit(self, request: RangeRequest, *, fresh: bool = False) -> "Future[np.ndarray]":
        """Fetch a range. The future gives its payload, uint8 (bytes,); `fresh` bypasses the cache.

        The future raises UserError at once for what a repetition cannot mend, and TransientError once
        repetitions have failed for `retry_seconds`.
        """
        # Only whole blocks are cached: every epoch cuts other ranges out of them.
        if self._cache is None or request.block is None:
            return self._start_race(request)
        if fresh:
            self._cache.delete(request.whole_block())
            return self._start_race(request)
        part: Future[np.ndarray] = Future()
        self._pool.submit(self._fetch_through_cache, request, part, self._cache)
        return part

    def metrics(self) -> dict[str, float]:
        """Counters, and times of the last 1,000 requests, by TensorBoard's names."""
        stats = self.stats
        counts: dict[str, float] = {name: stats[name.removeprefix("data/")] for name in COUNTS}
        if self._cache is not None:
            hits, misses = stats["cache_hits"], stats["cache_misses"]
            counts["data/cache_hit_share"] = hits / max(hits + misses, 1)
        return {
            **counts,
            "data/get_p50_ms": 1000 * stats.percentile(50),
            "data/get_p95_ms": 1000 * stats.percentile(95),
            "data/get_p99_ms": 1000 * stats.percentile(99),
            "data/fetched_per_used": stats["bytes_fetched"] / max(stats["bytes_used"], 1),
            "data/connections": self.limiter.limit,
        }

    def close(self) -> None:
        """Give up all requests that still run or wait."""
        # Requests look at this event between pieces, so even those that run end soon.
        self._closing.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._hedges.shutdown(wait=False, cancel_futures=True)
        self._watcher.join()

    def _fetch_through_cache(
        self, request: RangeRequest, part: "Future[np.ndarray]", cache: BlockCache
    ) -> None:
        """Deliver a range from the cache, or fetch its whole block for all requests that wait for a part of it."""
        block = request.whole_block()
        is_first = False
        with self._lock:
            # In this order: a block stays in `_fetching_blocks` until it is in the cache.
            fetching = self._fetching_blocks.get(block)
            if fetching is None and not cache.contains(block):
                fetching, is_first = Future(), True
                self._fetching_blocks[block] = fetching
        if fetching is None:
            self._read_cached(request, part, cache)
            return
        self.stats.count(cache_misses=1)

        def write_to_cache(done: "Future[np.ndarray]") -> None:
            if done.exception() is None:
                cache.write(block, done.result())
            with self._lock:
                del self._fetching_blocks[block]

        def deliver(done: "Future[np.ndarray]") -> None:
            error = done.exception()
            if error is not None:
                part.set_exception(error)
                return
            # A copy, because a view would keep the whole block in memory.
            part.set_result(block.extract(done.result(), request).copy())

        fetching.add_done_callback(deliver)
        if is_first:
            fetching.add_done_callback(write_to_cache)
            self._pool.submit(self._run, _Race(block, result=fetching))

    def _read_cached(self, request: RangeRequest, part: "Future[np.ndarray]", cache: BlockCache) -> None:
        found = cache.read(request)
        if found is None:  # removed in the meantime to make room, or no permission to read it
            self._pool.submit(self._run, _Race(request, result=part))
            return
        self.stats.count(cache_hits=1)
        part.set_result(found)

    def _start_race(self, request: RangeRequest) -> "Future[np.ndarray]":
        race = _Race(request)
        self._pool.submit(self._run, race)
        return race.result

    def _run(self, race: _Race) -> None:
        with self._lock:
            self._races.add(race)
        try:
            self._fetch_with_retries(race)
        except AbandonedError:
            race.fail(AbandonedError("the reader was closed"))
        except Exception as e:  # noqa: BLE001 (the future raises it)
            race.fail(e)
        finally:
            with self._lock:
                self._races.discard(race)

    def _fetch_with_retries(self, race: _Race) -> None:
        """Attempt a request until there is a result, or until repetitions make no sense any more."""
        first_failure, attempt = math.inf, 0
        while not race.result.done():
            try:
                with self.limiter:
                    race.attempt_started = time.monotonic()
                    self.stats.count(requests=1)
                    self._attempt(race)
            # UserError is not caught: no repetition mends a missing permission or an object that was
            # replaced.
            except UnreachableError as e:
                if race.result.done():
                    return
                self.stats.count(retries=1, throttled=int(getattr(e, "throttled", False)))
                first_failure, attempt = min(first_failure, time.monotonic()), attempt + 1
                if time.monotonic() - first_failure > self._retry_seconds:
                    raise TransientError(f"{e}, still so after {attempt} attempts") from None
                # A request that waits to be repeated is not slow, and is not hedged.
                race.attempt_started = math.inf
                wait = random.uniform(0, min(MAX_WAIT_SECONDS, MIN_WAIT_SECONDS * 2**attempt))  # noqa: S311
                # Sleep, but no longer than until the reader is closed.
                if self._closing.wait(wait):
                    raise AbandonedError from None

    def _attempt(self, race: _Race) -> bool:
        """Fetch the range once. Returns whether this attempt has won the race."""
        request = race.request
        started = time.monotonic()
        deadline = started + READ_SECONDS + request.length / MIN_BYTES_PER_SECOND

        def progress(num_bytes: int) -> bool:
            self.stats.count(bytes_fetched=num_bytes)
            if time.monotonic() > deadline:
                raise TransientError(f"{request.store.url}/{request.object.name}: the body only trickles")
            return not (race.result.done() or self._closing.is_set())

        # A buffer for each attempt: both of a race may receive at the same time.
        payload = np.empty(request.payload_bytes(), np.uint8)
        request.store.fetch(request.object, request.offset, request.buffers(payload.data), progress)
        self.stats.add_seconds(time.monotonic() - started)
        return race.win(payload)

    def _hedge(self, race: _Race) -> None:
        # Without the limiter: slow requests may fill it up, and the attempts that should relieve them would
        # wait.
        try:
            if not race.result.done() and self._attempt(race):
                self.stats.count(hedges_won=1)
        except (UnreachableError, AbandonedError):
            pass  # the regular attempt goes on
        except Exception as e:  # noqa: BLE001 (the future raises it)
            race.fail(e)

    def _hedge_slow_requests(self) -> None:
        """The watcher thread: send a second attempt beside each request that is slow, as long as the budget lasts."""
        while not self._closing.wait(0.02):
            with self._lock:
                # Local reads are not hedged, because a second one would wait for the same disk.
                races = [race for race in self._races if race.request.store.is_remote and not race.is_hedged]
            if not races:
                continue
            usual = self.stats.percentile(95)
            for race in races:
                usual_seconds = max(usual, race.request.length / SLOW_BYTES_PER_SECOND, MIN_HEDGE_SECONDS)
                if time.monotonic() - race.attempt_started > usual_seconds and self._may_hedge():
                    race.is_hedged = True
                    self.stats.count(hedges=1)
                    self._hedges.submit(self._hedge, race)

    def _may_hedge(self) -> bool:
        """Whether the budget allows one more hedged request."""
        # The first one is always allowed: if a run's very first request hangs, it would else wait for its
        # time limit.
        return self.stats["hedges"] <= HEDGE_SHARE * self.stats["requests"]
