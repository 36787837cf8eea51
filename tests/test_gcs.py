"""The fake Cloud Storage keeps the contract that readers and writers rely on, through the real clients."""

import base64
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import pytest
import requests
import tensorstore
from etils import epath
from google.api_core.exceptions import NotFound, PreconditionFailed
from google.cloud import storage

from tests.gcs import BUCKET, Fault, Server

CONTENT = bytes(range(256)) * 4


@pytest.fixture
def url(gcs: Server) -> str:
    """Address of an object's bytes."""
    gcs.put("data/x", CONTENT)
    return f"{gcs.address}/download/storage/v1/b/{BUCKET}/o/data%2Fx?alt=media"


@pytest.fixture
def bucket(gcs: Server) -> storage.Bucket:
    return storage.Client().bucket(BUCKET)


@pytest.mark.parametrize(
    ("asked", "status", "begin", "end"),
    [
        ("0-9", 206, 0, 10),
        ("5-", 206, 5, 1024),
        ("-4", 206, 1020, 1024),
        ("-9999", 206, 0, 1024),
        ("1000-9999", 206, 1000, 1024),
        ("1024-", 416, 0, 0),
        ("-0", 416, 0, 0),
    ],
)
def test_ranges(url: str, asked: str, status: int, begin: int, end: int) -> None:
    answer = requests.get(url, headers={"Range": f"bytes={asked}"}, timeout=5)
    assert (answer.status_code, answer.content) == (status, CONTENT[begin:end])
    if status == 206:
        assert answer.headers["Content-Range"] == f"bytes {begin}-{end - 1}/1024"


def test_a_generation_is_read_while_it_is_the_newest_and_is_a_404_after(gcs: Server, url: str) -> None:
    first = gcs.put("data/x", b"first")
    answer = requests.get(f"{url}&generation={first}", timeout=5)
    assert (answer.content, answer.headers["x-goog-generation"]) == (b"first", str(first))
    second = gcs.put("data/x", b"second")
    assert second > first
    assert requests.get(f"{url}&generation={first}", timeout=5).status_code == 404
    assert requests.get(f"{url}&ifGenerationMatch={first}", timeout=5).status_code == 412


def test_conditions_on_writes_hold(bucket: storage.Bucket) -> None:
    blob = bucket.blob("manifest")
    blob.upload_from_string(b"1", if_generation_match=0)
    with pytest.raises(PreconditionFailed):
        blob.upload_from_string(b"2", if_generation_match=0)
    blob.upload_from_string(b"2", if_generation_match=blob.generation)
    assert blob.download_as_bytes() == b"2"


def test_listing_is_in_pages_and_folds_folders(gcs: Server, bucket: storage.Bucket) -> None:
    for name in ("a/1", "a/2", "a/b/3", "a/b/4", "a/c/5", "d"):
        gcs.put(name, b"x")
    pages = list(bucket.list_blobs(page_size=2).pages)
    assert [[b.name for b in page] for page in pages] == [["a/1", "a/2"], ["a/b/3", "a/b/4"], ["a/c/5", "d"]]
    folded = bucket.list_blobs(prefix="a/", delimiter="/", page_size=1)
    assert [b.name for b in folded] == ["a/1", "a/2"]
    assert folded.prefixes == {"a/b/", "a/c/"}
    between = bucket.list_blobs(start_offset="a/2", end_offset="a/c")
    assert [b.name for b in between] == ["a/2", "a/b/3", "a/b/4"]


def test_absent_objects_and_buckets_are_not_found(gcs: Server, bucket: storage.Bucket) -> None:
    with pytest.raises(NotFound):
        bucket.blob("absent").download_as_bytes()
    with pytest.raises(NotFound):
        list(storage.Client().bucket("absent").list_blobs())


def test_uploads_small_large_and_in_pieces_arrive_with_their_checksums(
    gcs: Server, bucket: storage.Bucket, tmp_path: Path
) -> None:
    content = CONTENT * 1024
    (tmp_path / "file").write_bytes(content)
    resumable = bucket.blob("resumable", chunk_size=1 << 18)
    resumable.upload_from_filename(str(tmp_path / "file"), checksum="crc32c")
    with bucket.blob("written").open("wb", chunk_size=1 << 18) as f:
        f.write(content)
    bucket.blob("at-once").upload_from_string(content, checksum="md5")
    bucket.blob("joined").compose([bucket.blob("at-once"), bucket.blob("written")])
    bucket.copy_blob(bucket.blob("joined"), bucket, "copied")
    expected = {"at-once": 1, "copied": 2, "joined": 2, "resumable": 1, "written": 1}
    assert gcs.contents() == {name: content * times for name, times in expected.items()}
    (blob, *_) = bucket.list_blobs(prefix="copied")
    assert blob.size == len(content) * 2
    assert base64.b64decode(blob.crc32c) == google_crc32c.Checksum(content * 2).digest()


def test_etils_and_tensorstore_write_list_and_remove(gcs: Server) -> None:
    folder = epath.Path(f"gs://{BUCKET}/checkpoints")
    (folder / "1" / "file").write_text("text")
    assert [p.name for p in folder.iterdir()] == ["1"]
    assert (folder / "1" / "file").read_text() == "text"
    store = tensorstore.KvStore.open(f"gs://{BUCKET}/checkpoints/1/").result()
    store.write("array", CONTENT).result()
    assert store.list().result() == [b"array", b"file"]
    assert store.read("array").result().value == CONTENT
    (folder / "1").rmtree()
    assert gcs.contents() == {}


# Faults


def test_statuses_hit_as_often_as_told_and_are_retried_by_the_client(
    gcs: Server, bucket: storage.Bucket
) -> None:
    gcs.put("x", CONTENT)
    gcs.faults = [Fault("status", status=503, count=1), Fault("status", status=429, count=1)]
    assert bucket.blob("x").download_as_bytes() == CONTENT
    assert [a.status for a in gcs.reads()] == [503, 429, 200]


def test_faults_truncate_or_corrupt_bodies(gcs: Server, url: str) -> None:
    def read(**fault: object) -> bytes:
        gcs.faults = [Fault(count=1, **fault)]  # type: ignore[arg-type]
        with requests.get(url, stream=True, timeout=5) as answer:
            assert answer.headers["Content-Length"] == "1024"
            return b"".join(iter(lambda: answer.raw.read(64), b""))

    spoilt = read(kind="corrupt", at=0.25)
    assert [i for i in range(1024) if spoilt[i] != CONTENT[i]] == [256]
    with pytest.raises(Exception, match=r"IncompleteRead\(512 bytes read, 512 more expected\)"):
        read(kind="short")
    with pytest.raises(Exception, match="Connection reset by peer"):
        read(kind="reset")
    assert read(kind="status", after=1) == CONTENT


def test_a_stall_lasts_until_it_is_released(gcs: Server, url: str) -> None:
    gcs.faults = [Fault("stall", seconds=60, at=0.5)]
    with requests.get(url, stream=True, timeout=5) as answer:
        assert answer.raw.read(512) == CONTENT[:512]
        gcs.release()
        assert answer.raw.read() == CONTENT[512:]


def test_a_seeded_share_hits_the_same_requests_in_whatever_order_they_come(gcs: Server, url: str) -> None:
    def hit(order: list[int]) -> set[int]:
        gcs.faults = [Fault("status", share=0.3, seed=7)]
        gcs.forget()
        for i in order:
            requests.get(url, headers={"Range": f"bytes={i}-{i}"}, timeout=5)
        return {i for i, a in zip(order, gcs.reads(), strict=True) if a.status == 503}

    forwards = hit(list(range(100)))
    assert 15 < len(forwards) < 45
    assert hit(list(reversed(range(100)))) == forwards


def test_latencies_of_connections_overlap(gcs: Server, url: str) -> None:
    gcs.latency = 0.2
    begun = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: requests.get(url, timeout=5), range(16)))
    assert time.monotonic() - begun < 16 * 0.2 / 2
    assert gcs.max_concurrent > 4


def test_other_processes_set_faults_over_http(gcs: Server, url: str) -> None:
    rules = [{"kind": "status", "status": 404, "object": "data/*"}]
    requests.post(f"{gcs.address}/faults", json={"rules": rules, "latency": 0.001}, timeout=5)
    assert requests.get(url, timeout=5).status_code == 404
    assert requests.get(f"{gcs.address}/counters", timeout=5).json()["reads"] == 1
