"""What a format's module gives: the records of one shard, and how to read their bytes in place."""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, Protocol


class ScannedRecord(NamedTuple):
    """One record as a scan finds it."""

    offset: int
    """Of the image's first byte in the shard."""
    length: int
    """Bytes from there to the image's last, framing included."""
    label: int
    image: bytes
    """The encoded image, without framing."""


class Framing(NamedTuple):
    """Bytes of the container itself amid those of a record: each multiple of `period` begins with `header`."""

    period: int
    """In bytes of the shard."""
    header: int
    """In bytes."""

    def strip(self, data: bytes, offset: int) -> bytes:
        """The payload of `data`, which lies at byte `offset` of the shard and begins outside of a header."""
        first = -offset % self.period
        if first >= len(data):
            return data
        kept = [data[i + self.header : i + self.period] for i in range(first, len(data), self.period)]
        return b"".join([data[:first], *kept])


class Format(Protocol):
    """What a format's module holds."""

    SUFFIXES: tuple[str, ...]
    """Endings of its shards' names, before any -00000-of-01024."""
    FRAMING: Framing | None

    def scan(self, file: BinaryIO) -> Iterator[ScannedRecord]:
        """The records of a shard, in order. Raises ValueError, with the byte, where it is damaged or cut off."""
        ...
