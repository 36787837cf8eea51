"""Containers of records: where in a shard each encoded image lies, and its label.

A new format is one file here, with SUFFIXES, FRAMING and scan, and one line in FORMATS. Formats are
scanned once, into the table of trainer/data/table.py; training reads by that table alone.
"""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, Protocol, cast

from trainer.data.formats import array_record, tfrecord, webdataset


class Entry(NamedTuple):
    """One record as a scan finds it."""

    offset: int
    """Of the image's first byte in the shard."""
    length: int
    """Bytes from there to the image's last, framing included."""
    label: int
    image: bytes
    """The encoded image, without framing."""


class Framing(NamedTuple):
    """Bytes of the container itself amid those of a record: each multiple of `period` begins with `header` bytes."""

    period: int
    header: int


class Format(Protocol):
    """What a format's module holds."""

    SUFFIXES: tuple[str, ...]
    """Endings of its shards' names."""
    FRAMING: Framing | None

    def scan(self, file: BinaryIO) -> Iterator[Entry]:
        """The records of a shard, in order. Raises ValueError, with the byte, where it is damaged or cut off."""
        ...
