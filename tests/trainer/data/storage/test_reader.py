"""The reader, over a real HTTP server that breaks: what comes out is the stream of a server that does not."""

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from google.auth.exceptions import RefreshError, TransportError

from configs.errors import UserError
from configs.google import UnreachableError
from tests import gcs as cloud
from tests.trainer import datasets
from trainer.data.order import Order, ProcessStream
from trainer.data.storage.cache import PARTIAL, BlockCache
from trainer.data.storage.dataset import Dataset, open_dataset
from trainer.data.storage.fetch import ConcurrencyLimiter, Fetcher
from trainer.data.storage.reader import DamagedRecordError, Reader
from trainer.data.storage.store import TransientError

N, BATCH = 240, 16
IMAGES = datasets.blobs(N, size=3000)
URL = f"gs://{cloud.BUCKET}/data"
ORDER = Order(N, 5, "blocks", np.arange(0, N, 5), lanes=4, window=12)
PART = "data/part-*"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    datasets.write(folder, IMAGES)
    return folder


@pytest.fixture
def server(gcs: cloud.Server, folder: Path) -> cloud.Server:
    gcs.put_folder(folder, "data/")
    return gcs


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repetitions come soon: the tests are of what is repeated, not of how long that waits."""
    monkeypatch.setattr("trainer.data.storage.fetch.MIN_WAIT_SECONDS", 0.01)


@contextmanager
def reading(
    dataset: Dataset,
    fetcher: Fetcher,
    order: Order = ORDER,
    rows: np.ndarray = np.arange(BATCH),  # noqa: B008
    budget: int = 1 << 20,
    epochs: int = 2,
    **options: np.ndarray,
) -> Iterator[tuple[Reader, ProcessStream]]:
    stream = ProcessStream(order, 0, epochs * N // BATCH * BATCH, BATCH, rows)
    reader = Reader(dataset, stream, fetcher, budget_bytes=budget, **options)
    try:
        yield reader, stream
    finally:
        reader.close()


def take(reader: Reader, stream: ProcessStream, start: int = 0, stop: int | None = None) -> list[int]:
    """Read samples, compare each with what was written, and return their indices."""
    indices = []
    for i in range(start, len(stream) if stop is None else stop):
        position = stream.position(i)
        assert position is not None
        with reader.record(position) as (index, image):
            assert reader.verified(image, index).tobytes() == IMAGES[index]
            indices.append(index)
    return indices


def expected(stream: ProcessStream) -> list[int]:
    positions = [stream.position(i) for i in range(len(stream))]
    return stream.order.indices(np.array(positions)).tolist()


@pytest.fixture
def fetcher() -> Iterator[Fetcher]:
    fetcher = Fetcher(retry_seconds=5)
    yield fetcher
    fetcher.close()


@pytest.mark.parametrize(
    "order",
    [
        ORDER,
        Order(N, 5, "global", window=12),
        Order(N, 5, "none", window=12),
        Order(N, 5, "none", lanes=4, window=12),
    ],
    ids=["blocks", "global", "none", "none in lanes"],
)
@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_every_record_arrives_whole_and_in_order(
    order: Order, where: str, folder: Path, server: cloud.Server, fetcher: Fetcher
) -> None:
    dataset = open_dataset(str(folder) if where == "folder" else URL)
    for rows in np.arange(BATCH).reshape(2, -1):
        with reading(dataset, fetcher, order, rows) as (reader, stream):
            assert take(reader, stream) == expected(stream)


def test_hosts_together_read_each_byte_once_an_epoch(server: cloud.Server, fetcher: Fetcher) -> None:
    dataset = open_dataset(URL)
    server.forget()
    for rows in np.arange(BATCH).reshape(4, -1):
        with reading(dataset, fetcher, rows=rows, epochs=1) as (reader, stream):
            take(reader, stream)
    # Each range once: on a slow machine one may be raced by a second request.
    fetched = sum({(a.object, a.range): a.bytes for a in server.reads(PART)}.values())
    used = int(dataset.records["length"].sum())
    # Between two images lie 100 to 200 bytes of the container, and small gaps are read along: of images of
    # 3 KB that is some percent, of 110 KB 0.2 %.
    assert used <= fetched <= 1.1 * used
    assert fetcher.metrics()["data/fetched_per_used"] >= fetched / used


def fault(kind: str, **options: object) -> cloud.Fault:
    return cloud.Fault(kind, object=PART, **options)  # type: ignore[arg-type]


SURVIVED = {
    "503": fault("status", status=503, share=0.3, count=60),
    "429": fault("status", status=429, share=0.3, count=60),
    "408": fault("status", status=408, count=5),
    "reset in mid-body": fault("reset", share=0.3, count=40),
    "short body": fault("short", share=0.3, count=40),
    "corrupted body": fault("corrupt", share=0.2, count=40),
    "stall": fault("stall", after=30, count=1),
    "slow start": fault("slow", after=30, count=1, seconds=2.0),
}


@pytest.mark.parametrize("injected", SURVIVED.values(), ids=SURVIVED)
def test_the_stream_is_that_of_a_server_without_faults(
    injected: cloud.Fault, server: cloud.Server, fetcher: Fetcher
) -> None:
    dataset = open_dataset(URL)
    server.faults.append(injected)
    begun = time.monotonic()
    with reading(dataset, fetcher) as (reader, stream):
        assert take(reader, stream) == expected(stream)
    figures = fetcher.metrics()
    if injected.kind in ("stall", "slow"):
        # Without the second request it would take the read's time limit, or as long as the first byte takes.
        assert figures["data/hedges_won"] >= 1
        assert figures["data/hedges"] <= 1 + 0.05 * figures["data/requests"]
        assert time.monotonic() - begun < injected.seconds
    elif injected.kind == "corrupt":
        assert figures["data/checksum_failures"] > 0
    else:
        assert figures["data/retries"] > 0
    assert (figures["data/throttled"] > 0) == (injected.status == 429 and injected.kind == "status")


def test_many_slow_requests_at_once_are_raced_within_the_budget(server: cloud.Server) -> None:
    dataset = open_dataset(URL)
    fetcher = Fetcher(retry_seconds=5)
    with reading(dataset, fetcher, epochs=1) as (reader, stream):
        take(reader, stream)  # what is usual
    server.faults.append(fault("slow", seconds=0.4))
    with reading(dataset, fetcher, epochs=1) as (reader, stream):
        take(reader, stream)
    figures = fetcher.metrics()
    fetcher.close()
    assert 1 <= figures["data/hedges"] <= 1 + 0.05 * figures["data/requests"]


def test_a_body_that_only_trickles_is_given_up(server: cloud.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.storage.fetch.READ_SECONDS", 0.1)
    monkeypatch.setattr(
        "trainer.data.storage.fetch.HEDGE_SHARE", -1.0
    )  # no second request comes to the rescue
    dataset, fetcher = open_dataset(URL), Fetcher(retry_seconds=30)
    server.faults.append(fault("stall", seconds=1.0, count=1))
    with reading(dataset, fetcher, epochs=1) as (reader, stream):
        assert take(reader, stream) == expected(stream)
    assert fetcher.metrics()["data/retries"] >= 1  # a slow machine may give up others, too
    fetcher.close()


@pytest.mark.parametrize(
    "error",
    [
        RefreshError("timeout", retryable=True),
        RefreshError(TransportError("the metadata server does not answer")),
        TransportError("no route"),
    ],
)
def test_credentials_that_are_out_of_reach_for_a_moment_do_not_end_a_run(
    error: Exception, server: cloud.Server, fetcher: Fetcher
) -> None:
    dataset = open_dataset(URL)
    session = dataset.store._session  # type: ignore[attr-defined]
    errors = [error]

    def credentials_first(request: object, **options: object) -> object:
        if errors:
            raise errors.pop()
        return request

    session.auth = credentials_first  # requests asks it before each request is sent
    with reading(dataset, fetcher) as (reader, stream):
        assert take(reader, stream) == expected(stream)
    assert not errors
    assert fetcher.metrics()["data/retries"] == 1


def test_what_does_not_pass_is_told_with_its_object_and_number_of_attempts(server: cloud.Server) -> None:
    fetcher = Fetcher(retry_seconds=0.2)
    dataset = open_dataset(URL)
    server.faults.append(fault("status", status=503))
    with (
        reading(dataset, fetcher) as (reader, stream),
        pytest.raises(TransientError, match=rf"{URL}/part-0.* HTTP 503, still so after \d+ attempts"),
    ):
        take(reader, stream)
    fetcher.close()


def test_a_record_that_stays_damaged_is_told_after_reading_it_anew(
    server: cloud.Server, fetcher: Fetcher
) -> None:
    dataset = open_dataset(URL)
    server.faults.append(fault("corrupt"))
    with (
        reading(dataset, fetcher) as (reader, stream),
        pytest.raises(DamagedRecordError, match="4 times read anew"),
    ):
        take(reader, stream)


def test_a_shard_that_is_overwritten_ends_the_run_and_is_named(
    server: cloud.Server, fetcher: Fetcher
) -> None:
    dataset = open_dataset(URL)
    name = dataset.objects[1].name
    server.put(f"data/{name}", server.contents()[f"data/{name}"][::-1])
    with (
        reading(dataset, fetcher) as (reader, stream),
        pytest.raises(UserError, match=rf"{URL}/{name} was overwritten since the run began"),
    ):
        take(reader, stream)


def test_a_local_shard_that_is_overwritten_ends_the_run_too(tmp_path: Path, fetcher: Fetcher) -> None:
    datasets.write(tmp_path, IMAGES)
    dataset = open_dataset(str(tmp_path))
    shard = tmp_path / dataset.objects[1].name
    shard.write_bytes(shard.read_bytes()[::-1])
    os.utime(shard, ns=(0, 0))
    with (
        reading(dataset, fetcher) as (reader, stream),
        pytest.raises(UserError, match=rf"{shard} was overwritten since the run began"),
    ):
        take(reader, stream)


@pytest.mark.parametrize("where", ["folder", "bucket"])
def test_a_shard_that_disappears_ends_the_run_and_is_named(
    where: str, tmp_path: Path, server: cloud.Server, fetcher: Fetcher
) -> None:
    datasets.write(tmp_path, IMAGES)
    dataset = open_dataset(str(tmp_path) if where == "folder" else URL)
    name = dataset.objects[2].name
    (tmp_path / name).unlink()
    del server.objects[cloud.BUCKET, f"data/{name}"]
    with (
        reading(dataset, fetcher) as (reader, stream),
        pytest.raises(UserError, match=rf"{dataset.store.url}/{name} is gone"),
    ):
        take(reader, stream)


@pytest.mark.parametrize("status", [401, 403])
def test_expired_credentials_end_the_run_at_once_with_what_to_do(
    status: int, server: cloud.Server, fetcher: Fetcher
) -> None:
    dataset = open_dataset(URL)
    server.faults.append(fault("status", status=status))
    with (
        reading(dataset, fetcher) as (reader, stream),
        pytest.raises(UserError, match=rf"{URL}/part-.*gcloud auth"),
    ):
        take(reader, stream)
    assert fetcher.metrics()["data/retries"] == 0


def test_no_more_is_held_than_the_budget(server: cloud.Server, fetcher: Fetcher) -> None:
    dataset = open_dataset(URL)
    working_set = 4 * 12 * 4500
    budget = 2 * working_set
    with reading(dataset, fetcher, budget=budget) as (reader, stream):
        most = 0.0
        for i in range(len(stream)):
            take(reader, stream, i, i + 1)
            most = max(most, reader.metrics()["data/memory_mib"])
    assert working_set / 4 < most * 2**20 <= budget
    assert reader.metrics()["data/memory_mib"] == 0


def test_a_budget_below_one_window_slows_reading_but_does_not_hang(
    server: cloud.Server, fetcher: Fetcher
) -> None:
    with reading(open_dataset(URL), fetcher, budget=1) as (reader, stream):
        assert take(reader, stream) == expected(stream)


def test_closing_frees_who_waits_for_bytes(server: cloud.Server, fetcher: Fetcher) -> None:
    dataset = open_dataset(URL)
    server.faults.append(fault("stall"))
    with reading(dataset, fetcher) as (reader, _):
        while not server.reads(PART):
            time.sleep(0.01)
        reader.close()


def test_throttling_halves_the_connections_and_success_brings_them_back() -> None:
    limiter = ConcurrencyLimiter(32)
    assert limiter.limit == 8
    with pytest.raises(TransientError), limiter:
        raise TransientError("HTTP 429", throttled=True)
    assert limiter.limit == 4
    with pytest.raises(TransientError), limiter:  # of the same moment: no second halving
        raise TransientError("HTTP 429", throttled=True)
    assert limiter.limit == 4
    for _ in range(1000):
        with limiter:
            pass
    assert limiter.limit == 32


def test_requests_overlap_as_far_as_the_limit_goes(server: cloud.Server, fetcher: Fetcher) -> None:
    dataset = open_dataset(URL)
    server.latency = 0.05
    server.forget()
    with reading(dataset, fetcher) as (reader, stream):
        take(reader, stream)
    assert 4 <= server.counters()["max_concurrent"] <= 32


def cached(folder: Path, max_bytes: int = 1 << 30) -> Fetcher:
    return Fetcher(cache=BlockCache(folder, max_bytes), retry_seconds=5)


BLOCKS = {"block_starts": np.arange(0, N, 5)}


def test_a_second_run_reads_nothing_that_the_cache_has(server: cloud.Server, tmp_path: Path) -> None:
    dataset = open_dataset(URL)
    for run in range(2):
        server.forget()
        fetcher = cached(tmp_path)
        order = Order(N, run, "blocks", np.arange(0, N, 5), lanes=4, window=12)  # another order each time
        with reading(dataset, fetcher, order, **BLOCKS) as (reader, stream):
            assert take(reader, stream) == expected(stream)
        fetched, used = server.counters()["bytes_read"], int(dataset.records["length"].sum())
        assert fetched == 0 if run else used <= fetched <= 1.1 * used  # the second epoch was cached, too
        fetcher.close()
    assert fetcher.metrics()["data/cache_hit_share"] == 1


def test_a_damaged_cache_file_is_fetched_anew(server: cloud.Server, tmp_path: Path) -> None:
    dataset = open_dataset(URL)
    for _ in range(2):
        fetcher = cached(tmp_path)
        with reading(dataset, fetcher, **BLOCKS) as (reader, stream):
            assert take(reader, stream) == expected(stream)
        fetcher.close()
        # A block that is still being written when the fetcher closes is left out.
        complete = [file for file in tmp_path.iterdir() if not file.name.endswith(PARTIAL)]
        for number, file in enumerate(sorted(complete)):
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content if number % 2 else content[:100])
    assert fetcher.metrics()["data/checksum_failures"] > 0


def test_the_cache_stays_within_its_bound(server: cloud.Server, tmp_path: Path) -> None:
    dataset, fetcher = open_dataset(URL), cached(tmp_path, max_bytes=200_000)
    with reading(dataset, fetcher, **BLOCKS) as (reader, stream):
        for i in range(len(stream)):
            take(reader, stream, i, i + 1)
            with contextlib.suppress(FileNotFoundError):  # renamed while we looked
                assert sum(f.stat().st_size for f in tmp_path.iterdir()) <= 200_000
    assert fetcher.metrics()["data/cache_hit_share"] > 0
    fetcher.close()


def test_what_a_kill_left_in_the_cache_is_removed_and_not_read(tmp_path: Path) -> None:
    left = tmp_path / "123-1.partial"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    (tmp_path / "456-1.partial").write_bytes(b"another process is writing this")
    BlockCache(tmp_path, 1 << 20)
    assert [f.name for f in tmp_path.iterdir()] == ["456-1.partial"]


def test_a_name_that_does_not_resolve_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://storage.invalid")
    monkeypatch.setattr("configs.google.RETRY_SECONDS", 0.2)
    with pytest.raises(UnreachableError, match=r"gs://somewhere/x cannot be reached: .*storage\.invalid"):
        open_dataset("gs://somewhere/x")
