"""ArrayRecord files of tf.train.Example: what `launch data convert` writes, and what Grain itself reads, too.

They are Riegeli files (https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md):
chunks, with 24 bytes of header before each 64 KiB block, here called framing. With group_size:1,uncompressed
a chunk holds one record as it is. The last 64 KiB are ArrayRecord's postscript, which says where the records
end (https://github.com/google/array_record/blob/main/cpp/layout.proto).
"""

import struct
from collections.abc import Iterator
from typing import BinaryIO

from trainer.data.storage.formats import example
from trainer.data.storage.formats.protocol import Framing, ScannedRecord

SUFFIXES = (".array_record", ".arrayrecord")
FRAMING = Framing(1 << 16, 24)
OPTIONS = "group_size:1,uncompressed"
_PAYLOAD = FRAMING.period - FRAMING.header
# The skipped bytes are HighwayHash checksums, for which there is no Python package; the table has a crc32c
# instead.
_CHUNK_HEADER = struct.Struct("<8xQ8xQQ")
_MAGIC = 0x71930E704FDAE05E


def scan(file: BinaryIO) -> Iterator[ScannedRecord]:
    """The records of a shard, as Format.scan says.

    Positions here count the payload, as if there were no framing; an `offset` is one in the file.
    """
    at, stop = 0, _payload_position(_footer_offset(file))
    while at < stop:
        size, type_and_count, decoded_size = _CHUNK_HEADER.unpack(_read(file, at, _CHUNK_HEADER.size))
        kind, num_records = chr(type_and_count & 0xFF), type_and_count >> 8
        at += _CHUNK_HEADER.size
        if size > stop - at:
            raise ValueError(
                f"the chunk at byte {_file_offset(at):,} has {size:,} bytes by its header: it is damaged"
            )
        if kind == "r":
            chunk = _read(file, at, size)
            if num_records != 1 or chunk[:1] != b"\0":
                what = f"{num_records} records in a chunk" if num_records != 1 else "compressed records"
                raise ValueError(f"it has {what} (byte {_file_offset(at):,}); write it anew with {OPTIONS}")
            if decoded_size > size:
                raise ValueError(
                    f"the chunk at byte {_file_offset(at):,} is shorter than its record: it is damaged"
                )
            yield _entry(chunk[size - decoded_size :], at + size - decoded_size)
        elif kind not in "smp":  # signature, metadata, padding
            raise ValueError(
                f"byte {_file_offset(at):,} begins no chunk that {OPTIONS} writes; is it damaged?"
            )
        at += size


def _entry(record: bytes, at: int) -> ScannedRecord:
    try:
        start, stop, label = example.find_image(record)
    except ValueError as e:
        raise ValueError(f"the record at byte {_file_offset(at):,}: {e}") from None
    offset = _file_offset(at + start)
    return ScannedRecord(offset, _file_offset(at + stop - 1) + 1 - offset, label, record[start:stop])


def _file_offset(position: int) -> int:
    """The offset in the file of a byte of the payload."""
    block, rest = divmod(position, _PAYLOAD)
    return block * FRAMING.period + FRAMING.header + rest


def _payload_position(offset: int) -> int:
    """The position in the payload of a byte of the file; for a byte of a header, that of the byte after the header."""
    block, rest = divmod(offset, FRAMING.period)
    return block * _PAYLOAD + max(0, rest - FRAMING.header)


def _read(file: BinaryIO, position: int, size: int) -> bytes:
    """Read `size` bytes of the payload. Raises ValueError if the file ends before."""
    offset = _file_offset(position)
    length = _file_offset(position + size - 1) + 1 - offset if size else 0
    file.seek(offset)
    data = file.read(length)
    if len(data) < length:
        raise ValueError(f"it is damaged or cut off at byte {offset + len(data):,}")
    return FRAMING.strip(data, offset)


def _footer_offset(file: BinaryIO) -> int:
    """Where the records end, in bytes of the file.

    The last block says so, in equal records of the only chunk there. Raises ValueError if it does not.
    """
    size = file.seek(0, 2)
    if size >= 2 * FRAMING.period and size % FRAMING.period == 0:
        at = _payload_position(size - FRAMING.period)
        chunk_size, type_and_count, decoded_size = _CHUNK_HEADER.unpack(_read(file, at, _CHUNK_HEADER.size))
        num_records = type_and_count >> 8
        # The chunk of the postscript is small. One of images is larger, and is not worth decoding.
        if num_records and decoded_size <= chunk_size < 1024:
            chunk = _read(file, at + _CHUNK_HEADER.size, chunk_size)
            postscript = chunk[chunk_size - decoded_size :][: decoded_size // num_records]
            values = example.varints(postscript)
            if values.get(2) == _MAGIC and values.get(1, size) < size:
                return values[1]
    raise ValueError(f"it has no ArrayRecord postscript at its end, byte {size:,}: it is cut off, or is none")
