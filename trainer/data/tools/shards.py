"""Whole shards, as the tools read them: listed by an address, streamed in large ranges, verified."""

import tempfile
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

import numpy as np

from configs.errors import UserError
from trainer.data.storage.fetch import Fetcher
from trainer.data.storage.request import RangeRequest
from trainer.data.storage.store import Object, Store, checksum, open_store

RANGE_BYTES = 8 << 20
"""Size of the ranges in which a shard is streamed."""
RANGES_AHEAD = 4
"""Number of ranges that are requested before they are used."""
REREADS = 2
"""A shard that does not match its checksum is read again this often."""


def split_pattern(url: str) -> tuple[str, str]:
    """Folder and pattern of an address such as gs://bucket/imagenet/train-*; a folder alone has the pattern `*`."""
    folder, slash, last = url.rpartition("/")
    if any(character in last for character in "*?[") and not Path(url).exists():
        return folder if slash else ".", last
    return url, "*"


def list_shards(url: str) -> tuple[Store, list[Object]]:
    """The store and the objects at an address, which may end in a pattern. Raises UserError if there are none."""
    folder, pattern = split_pattern(url)
    store = open_store(folder)
    objects = [obj for obj in store.list() if fnmatchcase(obj.name, pattern)]
    if not objects:
        raise UserError(f"{folder} is empty" if pattern == "*" else f"{url}: nothing has such a name")
    for obj in objects:
        check_name(f"{folder}/{obj.name}")
    return store, objects


def check_name(path: str) -> None:
    """Raise UserError if a name cannot be written into a dataset."""
    try:
        path.encode()
    except UnicodeEncodeError:
        raise UserError(f"{path!a}: the name is not UTF-8; rename it") from None


def canonical(url: str) -> str:
    """The same text for every spelling of an address."""
    return url.rstrip("/") if "://" in url else str(Path(url).resolve())


def stream(requests: Iterable[RangeRequest]) -> Iterator[np.ndarray]:
    """The payload of each range, uint8 (bytes,), requested ahead of its use."""
    with closing(Fetcher()) as fetcher:
        waiting: deque[Future[np.ndarray]] = deque()
        for request in requests:
            waiting.append(fetcher.submit(request))
            if len(waiting) > RANGES_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextmanager
def open_verified(store: Store, obj: Object) -> Iterator[tuple[BinaryIO, int]]:
    """A shard as a local file, and the crc32c of the whole shard.

    Raises UserError if the content received is not what the store has.
    """
    if obj.crc32c is None:  # a local file, of which nobody knows the checksum
        with store.open(obj.name) as file:
            yield file, checksum(file)
        return
    starts = range(0, obj.size, RANGE_BYTES)
    ranges = [RangeRequest(store, obj, at, min(RANGE_BYTES, obj.size - at), framing=None) for at in starts]
    # On disk, because a shard may be larger than memory.
    with tempfile.TemporaryFile(prefix="podlaunch-") as copy:
        for _ in range(REREADS + 1):
            copy.seek(0)
            for part in stream(ranges):
                copy.write(part.data)
            if checksum(copy) == obj.crc32c:
                yield copy, obj.crc32c
                return
    raise UserError(f"{store.url}/{obj.name} comes damaged over the network, however often it is read")


def zero_based_label(label: int, first_label: int) -> int:
    """A label counted from 0. Raises ValueError if that is no valid label."""
    counted = label - first_label
    if not 0 <= counted < 2**31:
        less = f" less --first-label {first_label}" if first_label else ""
        raise ValueError(f"has the label {label}{less}, but labels are 0 to 2³¹ − 1")
    return counted
