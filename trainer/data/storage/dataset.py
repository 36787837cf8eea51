"""A dataset: shards in any of the known formats, and a table of where each record lies in them.

    manifest.json        shards with size and checksum, class names, format; published last
    records.npy          a row a record, in the order of the shards: offset, length, crc32c, label

`launch data convert` and `launch data index` write both, beside the shards or elsewhere.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from configs.errors import UserError
from trainer.data.storage.formats import FORMATS
from trainer.data.storage.request import RangeRequest
from trainer.data.storage.store import Object, Store, open_store

MANIFEST, RECORDS = "manifest.json", "records.npy"
VERSION = 1
BLOCK_BYTES = 4 << 20
"""Records that lie within a stretch of this size are a block. They are read by one request and shuffled as one."""
MIN_BLOCKS = 512
"""Blocks of a small dataset are smaller, so that there are at least about this many to shuffle."""
RECORD_DTYPE = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc32c", "<u4"), ("label", "<i4")])
"""One row of the table: the bytes [offset, offset + length) of a shard, framing included, hold the encoded
image.

crc32c (RFC 3720, appendix B.4) is that of the image without framing.
"""


@dataclass(frozen=True)
class Shard:
    """One object that holds records."""

    name: str
    size: int
    crc32c: int
    """Checksum of the whole object."""
    num_records: int


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says: a dataset without its table."""

    format: str
    """A name of trainer.data.storage.formats."""
    shards: tuple[Shard, ...]
    records_sha256: str
    """SHA-256 of the table's bytes, in hex."""
    classes: tuple[str, ...] | None
    """The name of each label, where known."""
    base: str | None = None
    """Address of the shards, where they do not lie beside the manifest."""
    version: int = VERSION

    @property
    def digest(self) -> str:
        """SHA-256 in hex that identifies the samples and their numbering, wherever they are stored."""
        # Without `base` and class names: a copy elsewhere, or other names, are the same samples.
        identity = [self.format, self.records_sha256, [(s.name, s.size, s.crc32c) for s in self.shards]]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    @property
    def num_examples(self) -> int:
        """Number of records in all shards."""
        return sum(s.num_records for s in self.shards)


@dataclass(frozen=True)
class Dataset:
    """An open dataset: its shards as they are now, and its table."""

    manifest: Manifest
    store: Store
    objects: tuple[Object, ...]
    """The shards, each pinned to the generation that was listed."""
    records: np.ndarray
    """The table, (num_examples,) RECORD_DTYPE."""
    shard_starts: np.ndarray
    """(shards + 1,) int64: the number of each shard's first record, then the number of all records."""

    def __len__(self) -> int:
        return len(self.records)

    def block_starts(self) -> np.ndarray:
        """(blocks,) int64: the first record of each block. Shuffling moves blocks, so even small datasets have many."""
        total = sum(obj.size for obj in self.objects)
        # Cut at fixed multiples of a size in each shard, so that a block is one range of bytes.
        pieces = self.records["offset"].astype(np.int64) // max(min(BLOCK_BYTES, total // MIN_BLOCKS), 1)
        shards = np.repeat(np.arange(len(self.objects)), np.diff(self.shard_starts))
        return np.flatnonzero((np.diff(shards, prepend=-1) != 0) | (np.diff(pieces, prepend=-1) != 0))

    def shard_of(self, indices: np.ndarray) -> np.ndarray:
        """The number of the shard that holds each record: (n,) int64 for (n,) integers."""
        return np.searchsorted(self.shard_starts, indices, side="right") - 1

    def byte_range(self, first: int, last: int) -> tuple[int, int]:
        """(offset, length) of the bytes from record `first` to record `last`, both of the same shard."""
        begin, end = self.records[first], self.records[last]
        offset = int(begin["offset"])
        return offset, int(end["offset"]) + int(end["length"]) - offset

    def request(self, first: int, last: int, block: tuple[int, int] | None = None) -> RangeRequest:
        """The request that reads the records from `first` to `last`, both of the same shard."""
        obj = self.objects[int(self.shard_of(np.array(first)))]
        return RangeRequest(
            self.store, obj, *self.byte_range(first, last), FORMATS[self.manifest.format].FRAMING, block
        )

    def describe(self, index: int) -> str:
        """A record in words, for messages: its object, its number there, its bytes."""
        shard, row = int(self.shard_of(np.array(index))), self.records[index]
        return (
            f"{self.store.url}/{self.objects[shard].name}, record {index - int(self.shard_starts[shard])} "
            f"(bytes {row['offset']} to {row['offset'] + row['length']})"
        )


def publish(
    destination: Store,
    *,
    format: str,  # noqa: A002 (the manifest's word)
    shards: Sequence[Shard],
    records: np.ndarray,
    classes: Sequence[str] | None,
    base: str | None = None,
) -> Manifest:
    """Write the table, then the manifest. Before the manifest is there, nothing of a dataset can be opened."""
    assert records.dtype == RECORD_DTYPE
    assert len(records) == sum(s.num_records for s in shards)
    buffer = io.BytesIO()
    np.save(buffer, records, allow_pickle=False)
    manifest = Manifest(
        format=format,
        shards=tuple(shards),
        records_sha256=_sha256(records),
        classes=tuple(classes) if classes is not None else None,
        base=base,
    )
    # The manifest is written last: where there is one, there is everything that it names.
    destination.write(RECORDS, buffer.getvalue())
    destination.write(MANIFEST, json.dumps(asdict(manifest), indent=1, ensure_ascii=False).encode())
    return manifest


def open_dataset(url: str) -> Dataset:
    """Read and check a dataset. Raises UserError if it is not what its manifest says."""
    table_store = open_store(url)
    try:
        manifest = parse_manifest(table_store.read(MANIFEST), url)
        buffer = table_store.read(RECORDS)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(_no_manifest_message(table_store)) from None
    try:
        # Unpickling would run code from a bucket that others may write to.
        records = np.load(io.BytesIO(buffer), allow_pickle=False)
    except (ValueError, EOFError):
        records = np.empty(0)
    if (
        records.dtype != RECORD_DTYPE
        or records.ndim != 1
        or _sha256(records) != manifest.records_sha256
        or len(records) != manifest.num_examples
    ):
        raise UserError(f"{url}/{RECORDS} is not that of {MANIFEST}; run `launch data index` on the shards")
    last = int(records["label"].max(initial=-1))
    if manifest.classes is not None and last >= len(manifest.classes):
        raise UserError(
            f"{url}/{MANIFEST} names {len(manifest.classes)} classes, but {RECORDS} has the label {last}; "
            "remove both, then run `launch data index`"
        )
    store = open_store(manifest.base) if manifest.base else table_store
    listed = {obj.name: obj for obj in store.list()}
    objects = tuple(_check_shard(shard, listed, store.url) for shard in manifest.shards)
    first = np.concatenate([[0], np.cumsum([s.num_records for s in manifest.shards])]).astype(np.int64)
    return Dataset(manifest, store, objects, records, first)


def _sha256(records: np.ndarray) -> str:
    return hashlib.sha256(records.view(np.uint8).data).hexdigest()


def parse_manifest(content: bytes, url: str) -> Manifest:
    """Read the content of manifest.json. Raises UserError if it is damaged or of another version."""
    try:
        fields = json.loads(content)
        if fields.get("version") != VERSION:
            raise UserError(
                f"{url}/{MANIFEST} has version {fields.get('version')}; this podlaunch reads {VERSION}: "
                "remove it, then run `launch data index` on the shards"
            )
        fields["shards"] = tuple(Shard(**shard) for shard in fields["shards"])
        fields["classes"] = tuple(fields["classes"]) if fields["classes"] is not None else None
        manifest = Manifest(**fields)
        _check_types(manifest)
        return manifest
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(
            f"{url}/{MANIFEST} cannot be read ({e}); remove it, then run `launch data index`"
        ) from None


def _check_types(manifest: Manifest) -> None:
    if manifest.format not in FORMATS:
        raise ValueError(f"format {manifest.format!r} is none of {', '.join(FORMATS)}")
    for shard in manifest.shards:
        numbers = (shard.size, shard.crc32c, shard.num_records)
        if not isinstance(shard.name, str) or not all(type(n) is int and n >= 0 for n in numbers):
            raise TypeError(f"{shard} is none of a name and three numbers")
    if not all(isinstance(text, str) for text in (*(manifest.classes or ()), manifest.base or "")):
        raise TypeError("classes and base are no text")


def _check_shard(shard: Shard, listed: dict[str, Object], url: str) -> Object:
    obj = listed.get(shard.name)
    if obj is None:
        raise UserError(f"{url}/{shard.name} is missing; the manifest lists it. Copy it there again")
    if obj.size != shard.size:
        what = "is cut off" if obj.size < shard.size else "is longer than it was"
        raise UserError(
            f"{url}/{shard.name} {what}: {obj.size:,} bytes, the manifest has {shard.size:,}. "
            "Copy it there again, or run `launch data index` if it was meant to change"
        )
    if obj.crc32c is not None and obj.crc32c != shard.crc32c:
        raise UserError(
            f"{url}/{shard.name} has other contents than its manifest says (crc32c {obj.crc32c:08x}, not "
            f"{shard.crc32c:08x}); copy it there again, or run `launch data index` if it was meant to change"
        )
    return obj


def _no_manifest_message(store: Store) -> str:
    """What lies at an address without a dataset, and what to do about it."""
    names = [obj.name for obj in store.list()]
    if not names:
        return (
            f"{store.url} is empty: no files lie directly in it; name the folder of one split, "
            "or fill it with `launch data convert`"
        )
    return (
        f"{store.url} holds {len(names)} objects ({names[0]}, …) but no {MANIFEST}: write it with "
        "`launch data index` for shards, or convert your images with `launch data convert`"
    )
