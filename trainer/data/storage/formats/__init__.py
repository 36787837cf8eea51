"""The formats of shards: where in a shard each encoded image lies, and its label.

A new format is one file here, with SUFFIXES, FRAMING and scan, and one line in FORMATS. Shards are scanned
once, into the table of a dataset (trainer/data/storage/dataset.py); training reads by that table and knows no
format.
"""

import re
from collections.abc import Iterable
from typing import cast

from configs.errors import UserError
from trainer.data.storage.formats import array_record, tfrecord, webdataset
from trainer.data.storage.formats.protocol import Format, Framing, ScannedRecord

__all__ = ["FORMATS", "Format", "Framing", "ScannedRecord", "detect_format", "format_of"]

FORMATS: dict[str, Format] = {
    "array_record": cast(Format, array_record),
    "tfrecord": cast(Format, tfrecord),
    "webdataset": cast(Format, webdataset),
}
_COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".lz4")
_NUMBERING = re.compile(r"-\d+-of-\d+$")


def format_of(name: str) -> str | None:
    """The format that the name of a shard says, or None."""
    stem = _NUMBERING.sub("", name)
    for format_name, module in FORMATS.items():
        if stem.endswith(module.SUFFIXES):
            return format_name
    # TFRecords of the first ImageNet scripts have no suffix: train-00000-of-01024.
    return "tfrecord" if stem != name and "." not in stem else None


def detect_format(names: Iterable[str]) -> str:
    """The one format of all shards among these names. Other files are ignored.

    Raises UserError if there is no shard, a compressed one, or more than one format.
    """
    names = list(names)
    examples = {name_format: name for name in reversed(names) if (name_format := format_of(name))}
    if len(examples) > 1:
        found = " and ".join(f"{name_format} ({name})" for name_format, name in sorted(examples.items()))
        raise UserError(f"shards of several formats: {found}; put each into a folder of its own")
    if examples:
        return next(iter(examples))
    for name in names:
        if name.endswith(_COMPRESSED):
            raise UserError(
                f"{name} is compressed, which cannot be read in ranges; decompress the shards first"
            )
    known = ", ".join(suffix for module in FORMATS.values() for suffix in module.SUFFIXES)
    raise UserError(
        f"no shards: {', '.join(names[:3]) or 'nothing there'}; the endings of shards are {known}"
    )
