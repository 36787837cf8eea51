"""TFRecord files of tf.train.Example, as TFDS and the ImageNet scripts for TPUs write them.

A record is a length (uint64), its masked crc32c, the data, and the data's masked crc32c, all little-endian
(https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details).
"""

import struct
from collections.abc import Iterator
from typing import BinaryIO

import google_crc32c

from trainer.data.storage.formats import example
from trainer.data.storage.formats.protocol import ScannedRecord

SUFFIXES = (".tfrecord", ".tfrecords", ".tfrec")
FRAMING = None
_HEADER = struct.Struct("<QI")


def scan(file: BinaryIO) -> Iterator[ScannedRecord]:
    """The records of a shard, as Format.scan says. Every checksum is verified."""
    at = 0
    while header := file.read(_HEADER.size):
        if at == 0 and header[:2] == b"\x1f\x8b":
            raise ValueError(
                "it is compressed with gzip, which cannot be read in ranges; decompress it first"
            )
        if len(header) < _HEADER.size:
            raise ValueError(f"it is cut off in the record at byte {at:,}")
        length, checksum = _HEADER.unpack(header)
        if masked_crc32c(header[:8]) != checksum:
            raise ValueError(f"the length at byte {at:,} does not match its checksum")
        record = file.read(length)
        trailer = file.read(4)
        if len(record) < length or len(trailer) < 4:
            raise ValueError(f"it is cut off in the record at byte {at:,}")
        if masked_crc32c(record) != int.from_bytes(trailer, "little"):
            raise ValueError(f"the record at byte {at:,} does not match its checksum")
        try:
            found = example.find_image(record)
        except ValueError as e:
            raise ValueError(f"the record at byte {at:,}: {e}") from None
        image = record[found.start : found.stop]
        yield ScannedRecord(at + _HEADER.size + found.start, len(image), found.label, image)
        at += _HEADER.size + length + 4


def masked_crc32c(data: bytes) -> int:
    """crc32c, rotated and with a constant added. TFRecord does so because a crc of data that contains crcs is weak."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
