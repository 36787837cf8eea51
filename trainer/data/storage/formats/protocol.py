"""What the module of a format provides: the records of a shard, and how to read their bytes in place."""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, Protocol


class ScannedRecord(NamedTuple):
    """One record of a shard, as a scan finds it."""

    offset: int
    """Where the image begins in the shard, in bytes."""
    length: int
    """Number of bytes from the image's first to its last, framing included."""
    label: int
    image: bytes
    """The encoded image without framing."""


class Framing(NamedTuple):
    """Bytes that the container inserts into records: a header at each multiple of `period`."""

    period: int
    """Distance of the headers, in bytes of the shard."""
    header: int
    """Size of a header in bytes."""

    def strip(self, data: bytes, offset: int) -> bytes:
        """Remove the framing from `data`, which lies at byte `offset` of the shard, outside of a header."""
        first = -offset % self.period
        if first >= len(data):
            return data
        kept = [data[i + self.header : i + self.period] for i in range(first, len(data), self.period)]
        return b"".join([data[:first], *kept])


class Format(Protocol):
    """The contents of a format's module."""

    SUFFIXES: tuple[str, ...]
    """Endings of the names of shards; a numbering as in -00000-of-01024 may follow them."""
    FRAMING: Framing | None
    """None where records are stored in one piece."""

    def scan(self, file: BinaryIO) -> Iterator[ScannedRecord]:
        """The records of a shard, in order. Raises ValueError, with the byte, if the shard is damaged or cut off."""
        ...
