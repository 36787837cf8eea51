"""`launch data convert`: from images in any known form to ArrayRecord shards that training streams.

convert.json            what is converted, and how: a killed conversion is only continued with the same
NNNNN-KK.array_record   shard KK of part NNNNN: written, read back, then moved or uploaded
NNNNN.part              the rows of a part whose shards are all there; deleted after the manifest is published
records.npy, manifest.json   published last; before that, nothing of this is a dataset
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from configs.errors import UserError
from configs.files import temporary_folder
from trainer.data.storage.dataset import MANIFEST, RECORD_DTYPE, Manifest, Shard, parse_manifest, publish
from trainer.data.storage.formats import array_record, example
from trainer.data.storage.store import Object, Store, checksum, open_store
from trainer.data.tools import inputs, parallel
from trainer.data.tools.images import is_image, shrink
from trainer.data.tools.inputs import Item, Listing, Part
from trainer.data.tools.shards import canonical, split_pattern, zero_based_label

JOURNAL = "convert.json"


@dataclass(frozen=True)
class Settings:
    """What the user has chosen. The same settings make the same dataset of the same input."""

    kind: str
    """One of inputs.KINDS."""
    resize: int | None = None
    """Larger images are shrunk to this short side in pixels."""
    shard_mib: int = 128
    """Size of a shard before any resizing."""
    first_label: int = 0
    """Subtracted from all labels."""
    seed: int = 0
    """Decides the order in which the images of an imagefolder are written."""
    classes: tuple[str, ...] | None = None
    """Name of each label; None takes the names that the input has."""


@dataclass(frozen=True)
class WrittenPart:
    """A part of the input whose shards are at the destination."""

    number: int
    shards: tuple[Shard, ...]
    records: np.ndarray
    """Rows of the table for all its shards, (records,) RECORD_DTYPE."""


Progress = Callable[[int, int], None]
"""Called with the images and the bytes of each part that is done."""


def convert(
    source: str, destination: str, settings: Settings, *, jobs: int, begin: Callable[[int, int], Progress]
) -> Manifest:
    """Write the dataset, continuing a killed conversion; a complete dataset is left as it is.

    `begin` is called with the number of parts and the bytes of the input before the first is read. Raises
    UserError if the input cannot be converted completely; then nothing is published.
    """
    _check_apart(source, destination, settings.kind)
    listing = inputs.list_input(
        settings.kind,
        source,
        classes=settings.classes,
        part_bytes=settings.shard_mib << 20,
        seed=settings.seed,
    )
    store = open_store(destination)
    journal = _journal(source, settings, listing)
    _check_destination(store, journal)  # before locking, so that a refused folder stays as it is
    with _locked(destination) as scratch:
        objects = _check_destination(store, journal)
        if not objects:
            store.write(JOURNAL, json.dumps(journal, indent=1, ensure_ascii=False).encode())
        if MANIFEST in objects:
            manifest = parse_manifest(store.read(MANIFEST), destination)
        else:
            manifest = _convert(store, objects, listing, settings, scratch, jobs, begin)
        for obj in store.list():
            if obj.name.endswith(".part"):
                store.delete(obj.name)
    return manifest


def read_classes(url: str) -> tuple[str, ...]:
    """The class names of another dataset. Raises UserError if it has none."""
    try:
        classes = parse_manifest(open_store(url).read(MANIFEST), url).classes
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"--classes {url}: no {MANIFEST} there; convert that split first") from None
    if classes is None:
        raise UserError(f"--classes {url}: this dataset has no class names; leave the option out")
    return classes


def _convert(
    store: Store,
    objects: dict[str, Object],
    listing: Listing,
    settings: Settings,
    scratch: Path,
    jobs: int,
    begin: Callable[[int, int], Progress],
) -> Manifest:
    progress = begin(len(listing.parts), sum(part.num_bytes for part in listing.parts))
    done = {w.number: w for w in _finished_parts(store, objects)}
    for number, written in done.items():
        progress(len(written.records), listing.parts[number].num_bytes)
    # Parts are as many as the listing says, in the same order, so their numbers survive a restart.
    rest = [(number, part) for number, part in enumerate(listing.parts) if number not in done]
    work = partial(_write_part, store.url, scratch, settings, listing.classes)
    for written in parallel.run(work, rest, jobs):
        done[written.number] = written
        progress(len(written.records), listing.parts[written.number].num_bytes)
    ordered = [done[number] for number in range(len(listing.parts))]
    records = np.concatenate([written.records for written in ordered])
    if not len(records):
        raise UserError("there is not one image in it")
    return publish(
        store,
        format="array_record",
        shards=list(chain.from_iterable(written.shards for written in ordered)),
        records=records,
        classes=listing.classes,
    )


# One part


def _write_part(
    destination: str,
    scratch: Path,
    settings: Settings,
    classes: Sequence[str] | None,
    numbered: tuple[int, Part],
) -> WrittenPart:
    number, part = numbered
    store = open_store(destination)
    shards, rows = [], []
    for k, items in enumerate(_shards(part.items(), settings.shard_mib << 20)):
        name = f"{number:05}-{k:02}.array_record"
        # With the process id, because a worker may outlive its killed parent for a moment and still write its
        # file while the next conversion has begun.
        file = scratch / f".{name}.{os.getpid()}.partial"
        try:
            shard, records = _write_shard(store, file, name, items, settings, classes)
        finally:
            # After a success the file has been moved; after an error it is of no use.
            file.unlink(missing_ok=True)
        shards.append(shard)
        rows.append(records)
    written = WrittenPart(number, tuple(shards), np.concatenate(rows) if rows else np.empty(0, RECORD_DTYPE))
    fields = {"shards": [asdict(shard) for shard in shards], "records": written.records.tobytes().hex()}
    store.write(_part_name(number), json.dumps(fields).encode())
    return written


def _shards(items: Iterator[Item], num_bytes: int) -> Iterator[Iterator[Item]]:
    """Split items into shards of about `num_bytes`. Each shard must be consumed before the next one is asked for."""

    def until_full(first: Item) -> Iterator[Item]:
        size = len(first.image)
        yield first
        while size < num_bytes and (item := next(items, None)) is not None:
            size += len(item.image)
            yield item

    while (first := next(items, None)) is not None:
        yield until_full(first)


def _write_shard(
    store: Store,
    file: Path,
    name: str,
    items: Iterable[Item],
    settings: Settings,
    classes: Sequence[str] | None,
) -> tuple[Shard, np.ndarray]:
    from array_record.python.array_record_module import ArrayRecordWriter

    intended = []
    try:
        writer = ArrayRecordWriter(str(file), array_record.OPTIONS)
        for item in items:
            image, label = _prepare(item, settings, classes)
            text = classes[label] if classes else None
            writer.write(example.serialize(image, label, text=text, filename=item.name))
            intended.append((google_crc32c.value(image), label))
        writer.close()
    except RuntimeError as e:  # the only exception that the writer raises
        raise UserError(f"{file} cannot be written: {str(e).splitlines()[0]}") from None
    try:
        shard, records = _read_back(file, name)
        # Compared with what was meant to be written, so that a failing disk or memory is noticed here and not
        # in training.
        same = list(zip(records["crc32c"].tolist(), records["label"].tolist(), strict=True)) == intended
    except ValueError:
        same = False
    if not same:
        raise UserError(f"{file} does not read as it was written; is the disk failing?")
    store.upload(name, file)
    return shard, records


def _prepare(item: Item, settings: Settings, classes: Sequence[str] | None) -> tuple[bytes, int]:
    """The bytes to write and the label. Raises UserError if an item is not an image with a label."""
    try:
        label = zero_based_label(item.label, settings.first_label)
    except ValueError as e:
        raise UserError(f"{item.name} {e}") from None
    if classes is not None and label >= len(classes):
        hint = "" if settings.first_label else "; if labels begin at 1, add --first-label 1"
        raise UserError(f"{item.name} has the label {label}, but there are {len(classes)} classes{hint}")
    if not is_image(item.image):
        raise UserError(f"{item.name} is no image by its content; mend or remove it")
    if settings.resize is None:
        return item.image, label
    try:
        return shrink(item.image, settings.resize), label
    except ValueError as e:
        raise UserError(f"{item.name} cannot be decoded ({e}); mend or remove it") from None


def _read_back(file: Path, name: str) -> tuple[Shard, np.ndarray]:
    """Scan a shard that was just written."""
    with file.open("rb") as f:
        rows = [(e.offset, e.length, google_crc32c.value(e.image), e.label) for e in array_record.scan(f)]
        return Shard(name, file.stat().st_size, checksum(f), len(rows)), np.array(rows, RECORD_DTYPE)


# Going on


def _journal(source: str, settings: Settings, listing: Listing) -> dict[str, Any]:
    """The content of convert.json: whatever decides what the dataset will be."""
    folder, pattern = split_pattern(source)
    fields = asdict(settings)
    fields["classes"] = list(listing.classes) if listing.classes else None
    address = canonical(folder) if pattern == "*" else f"{canonical(folder)}/{pattern}"
    return {"source": address, **fields, "input": listing.digest}


def _check_destination(store: Store, journal: dict[str, Any]) -> dict[str, Object]:
    """The objects at the destination if this conversion has begun there; none if it may begin.

    Else raises UserError.
    """
    objects = {obj.name: obj for obj in _list_destination(store)}
    if objects.keys() <= {JOURNAL}:
        return {}
    if JOURNAL not in objects:
        what = "holds a dataset already" if MANIFEST in objects else f"is not empty ({min(objects)}, …)"
        raise UserError(f"{store.url} {what}; give an empty folder or prefix")
    try:
        existing = dict(json.loads(store.read(JOURNAL)))
    except (ValueError, TypeError):
        raise UserError(f"{store.url}/{JOURNAL} is damaged; give an empty folder or prefix") from None
    changed = [key for key in journal if existing.get(key) != journal[key]]
    if changed:
        state = "a conversion" if MANIFEST in objects else "an unfinished conversion"
        raise UserError(
            f"{store.url} holds {state} of {existing.get('source')} that differs in {', '.join(changed)}; "
            "undo that, or give an empty folder or prefix"
        )
    return objects


def _list_destination(store: Store) -> list[Object]:
    try:
        return store.list()
    except UserError:
        if "://" in store.url or Path(store.url).exists():
            raise
        return []


def _part_name(number: int) -> str:
    return f"{number:05}.part"


def _finished_parts(store: Store, objects: dict[str, Object]) -> Iterator[WrittenPart]:
    """The parts whose shards are there as they were written. One whose rows are damaged is not among them."""
    for name in (name for name in objects if name.endswith(".part")):
        try:
            fields = json.loads(store.read(name))
            shards = tuple(Shard(**shard) for shard in fields["shards"])
            records = np.frombuffer(bytes.fromhex(fields["records"]), RECORD_DTYPE)
        except (ValueError, TypeError, KeyError):
            continue
        # If a shard was removed or cut off since then, its part is converted again.
        if all(s.name in objects and objects[s.name].size == s.size for s in shards):
            yield WrittenPart(int(name.removesuffix(".part")), shards, records)


def _check_apart(source: str, destination: str, kind: str) -> None:
    source_at, destination_at = canonical(split_pattern(source)[0]), canonical(destination)
    is_inside = kind == "imagefolder" and destination_at.startswith(f"{source_at}/")
    if source_at == destination_at or is_inside:
        raise UserError(f"{destination} lies in the input {source}; give another folder or prefix")


@contextmanager
def _locked(destination: str) -> Iterator[Path]:
    """A local folder for unfinished shards, locked against other conversions to the same destination.

    Where the destination is a folder, this is the destination itself, so that shards can be moved within it.
    """
    if "://" in destination:
        with temporary_folder("convert") as scratch:
            yield scratch
        return
    folder = Path(destination)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
    except OSError as e:
        raise UserError(f"{destination} cannot be written: {e.strerror}") from None
    try:
        # The kernel drops this lock when the process ends, however it ends.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for leftover in folder.glob(".*.partial"):
            leftover.unlink(missing_ok=True)
        yield folder
    except BlockingIOError:
        raise UserError(f"{destination}: another conversion into it is running") from None
    finally:
        os.close(descriptor)
