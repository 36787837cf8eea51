"""`launch data index`: make the table of a dataset for shards that stay where they are."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import google_crc32c
import numpy as np

from configs.errors import UserError
from trainer.data.storage.dataset import MANIFEST, RECORD_DTYPE, Manifest, Shard, parse_manifest, publish
from trainer.data.storage.formats import FORMATS, detect_format, format_of
from trainer.data.storage.store import Object, Store, open_store
from trainer.data.tools import parallel
from trainer.data.tools.shards import canonical, list_shards, open_verified, split_pattern, zero_based_label


@dataclass(frozen=True)
class _Scanned:
    """One scanned shard."""

    number: int
    shard: Shard
    records: np.ndarray


def index(
    source: str,
    destination: str | None,
    *,
    first_label: int,
    jobs: int,
    begin: Callable[[int, int], Callable[[int, int], None]],
) -> Manifest:
    """Scan all shards and publish their table, beside them or at `destination`.

    `begin` is called with the number of shards and their bytes, and returns a function that is called with
    the records and bytes of each shard once it is scanned. Raises UserError if a shard cannot be read
    completely.
    """
    store, objects = list_shards(source)
    folder, pattern = split_pattern(source)
    if destination is None and pattern != "*":
        raise UserError(f"{source} is a part of a folder: give the table a folder of its own with --to")
    try:
        name = detect_format(obj.name for obj in objects)
    except UserError as e:
        raise UserError(f"{source}: {e}") from None
    shards = [obj for obj in objects if format_of(obj.name) == name]
    base = None if destination is None or canonical(destination) == canonical(folder) else canonical(folder)
    table_store = open_store(folder if destination is None else destination)
    before = _older_table(table_store, base)
    progress = begin(len(shards), sum(obj.size for obj in shards))
    scanned: dict[int, _Scanned] = {}
    for one in parallel.run(partial(_scan, store.url, name, first_label), list(enumerate(shards)), jobs):
        scanned[one.number] = one
        progress(len(one.records), one.shard.size)
    ordered = [scanned[number] for number in range(len(shards))]
    records = np.concatenate([one.records for one in ordered])
    if not len(records):
        raise UserError(f"{source}: the {len(shards)} shards hold no records")
    # Shards have no class names, so those of an older table are kept.
    classes = before.classes if before else None
    if classes is not None and records["label"].max() >= len(classes):
        classes = None  # the older table was that of other shards
    return publish(
        table_store,
        format=name,
        shards=[one.shard for one in ordered],
        records=records,
        classes=classes,
        base=base,
    )


def _older_table(table_store: Store, base: str | None) -> Manifest | None:
    """The manifest that the new table replaces, if any. Raises UserError if it is that of other shards."""
    try:
        manifest = parse_manifest(table_store.read(MANIFEST), table_store.url)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if manifest.base != base:
        raise UserError(
            f"{table_store.url} holds the table of {manifest.base or 'its own shards'}; give another --to"
        )
    return manifest


def _scan(url: str, format_name: str, first_label: int, numbered: tuple[int, Object]) -> _Scanned:
    number, obj = numbered
    store: Store = open_store(url)
    rows: list[tuple[int, int, int, int]] = []
    with open_verified(store, obj) as (file, crc):
        try:
            for entry in FORMATS[format_name].scan(file):
                # An empty image matches its checksum, so nothing before training would notice it.
                if not entry.image:
                    raise ValueError(f"record {len(rows)} (byte {entry.offset:,}): its image is empty")
                try:
                    label = zero_based_label(entry.label, first_label)
                except ValueError as e:
                    raise ValueError(f"record {len(rows)} {e}") from None
                rows.append((entry.offset, entry.length, google_crc32c.value(entry.image), label))
        except ValueError as e:
            raise UserError(f"{url}/{obj.name}: {e}") from None
    return _Scanned(number, Shard(obj.name, obj.size, crc, len(rows)), np.array(rows, RECORD_DTYPE))
