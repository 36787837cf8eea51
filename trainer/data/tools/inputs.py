"""What `launch data convert` can read: a folder of images for each class, shards of the known formats, and
the Parquet files of Hugging Face.

An input is listed once, and split into parts that processes convert independently of each other.
"""

import hashlib
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from configs.errors import UserError
from trainer.data.storage.formats import FORMATS, format_of
from trainer.data.storage.store import Object, open_store
from trainer.data.tools.shards import check_name, list_shards, open_verified

KINDS = ("imagefolder", "tfrecord", "webdataset", "parquet")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
PARQUET_IMAGES, PARQUET_LABEL = ("image", "img"), "label"


class Item(NamedTuple):
    """One image of an input."""

    image: bytes
    """The encoded image."""
    label: int
    name: str
    """For messages; kept in the dataset as image/filename."""


class Part(Protocol):
    """What one process converts at a time."""

    @property
    def num_bytes(self) -> int: ...

    def items(self) -> Iterator[Item]:
        """The images of this part. Raises UserError if something cannot be read."""
        ...


@dataclass(frozen=True)
class Listing:
    """The contents of an input, before any of it is read."""

    parts: tuple[Part, ...]
    classes: tuple[str, ...] | None
    digest: str
    """Identifies what was listed, by names and sizes."""


def list_input(
    kind: str, source: str, *, classes: tuple[str, ...] | None, part_bytes: int, seed: int
) -> Listing:
    """List an input of one of KINDS. Raises UserError if it is not what `kind` says."""
    if kind == "imagefolder":
        return _list_folder(source, classes, part_bytes, seed)
    store, objects = list_shards(source)
    objects = [obj for obj in objects if _kind_of(obj.name) == kind]
    if not objects:
        raise UserError(f"{source} holds no {kind} shards")
    if kind == "parquet" and classes is None:
        classes = _parquet_classes(store.url, objects[0])
    digest = _digest(f"{obj.name}\0{obj.size}\0{obj.crc32c}" for obj in objects)
    return Listing(tuple(ShardPart(store.url, obj, obj.size) for obj in objects), classes, digest)


def _kind_of(name: str) -> str | None:
    return "parquet" if name.endswith(".parquet") else format_of(name)


def _digest(lines: Iterator[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# Folders


@dataclass(frozen=True)
class FolderPart:
    """Image files in the class folders of an imagefolder."""

    source: str
    files: tuple[tuple[str, int], ...]
    """(CLASS/NAME, label) of each file."""
    num_bytes: int

    def items(self) -> Iterator[Item]:
        for name, label in self.files:
            path = Path(self.source, name)
            try:
                yield Item(path.read_bytes(), label, name)
            except OSError as e:
                raise UserError(f"{path} cannot be read: {e.strerror}") from None


def _list_folder(source: str, classes: tuple[str, ...] | None, part_bytes: int, seed: int) -> Listing:
    if "://" in source:
        raise UserError(f"{source}: an imagefolder is read from a local folder; copy it to a disk first")
    root = Path(source)
    if not root.is_dir():
        raise UserError(f"{source}: there is no such folder")
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise UserError(
            f"{source} holds no folders; an imagefolder has a folder a class: {source}/CLASS/IMAGE"
        )
    classes = classes or tuple(folders)
    labels = {name: label for label, name in enumerate(classes)}
    files: list[tuple[str, int, int]] = []
    for name in folders:
        if name not in labels:
            raise UserError(f"{root / name}: {name!r} is not among the {len(classes)} classes of --classes")
        files += [(file, labels[name], size) for file, size in _class_files(root, name)]
    # By names and sizes, because the content would have to be read once more.
    digest = _digest(f"{name}\0{size}" for name, _, size in files)
    # Training shuffles blocks of neighbours, so neighbours must not all be of one class.
    random.Random(seed).shuffle(files)  # noqa: S311
    return Listing(tuple(_cut_into_parts(source, files, part_bytes)), classes, digest)


def _class_files(root: Path, name: str) -> list[tuple[str, int]]:
    """(CLASS/NAME, size in bytes) of the images of a class, sorted by name."""
    files = []
    check_name(str(root.resolve() / name))
    with os.scandir(root / name) as entries:  # Path.iterdir() takes seconds longer for a million files
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            check_name(entry.path)
            if entry.is_dir():
                raise UserError(
                    f"{entry.path} is a folder, but an imagefolder is {root}/CLASS/IMAGE; "
                    f"did you mean {root / name}?"
                )
            if os.path.splitext(entry.name)[1].lower() not in IMAGE_SUFFIXES:
                raise UserError(
                    f"{entry.path} is no image by its name; remove it, or give it its true ending"
                )
            files.append((f"{name}/{entry.name}", entry.stat().st_size))
    if not files:
        raise UserError(f"{root / name}: a class folder without images; fill it or remove it")
    return files


def _cut_into_parts(source: str, files: list[tuple[str, int, int]], part_bytes: int) -> Iterator[FolderPart]:
    """Parts of at least `part_bytes`; the last one may be smaller."""
    begin = size = 0
    for i, (_, _, file_size) in enumerate(files):
        size += file_size
        if size >= part_bytes or i == len(files) - 1:
            yield FolderPart(source, tuple((name, label) for name, label, _ in files[begin : i + 1]), size)
            begin, size = i + 1, 0


# Shards


@dataclass(frozen=True)
class ShardPart:
    """One shard or Parquet file."""

    url: str
    obj: Object
    num_bytes: int

    def items(self) -> Iterator[Item]:
        kind = _kind_of(self.obj.name)
        assert kind is not None
        with open_verified(open_store(self.url), self.obj) as (file, _):
            try:
                for record, (image, label) in enumerate(_images_and_labels(kind, file)):
                    yield Item(image, label, f"{self.obj.name}/{record}")
            except ValueError as e:
                raise UserError(f"{self.url}/{self.obj.name}: {e}") from None


def _images_and_labels(kind: str, file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """The image and the label of each record. Raises ValueError if the shard is damaged."""
    if kind == "parquet":
        return _parquet_images_and_labels(file)
    return ((entry.image, entry.label) for entry in FORMATS[kind].scan(file))


def _parquet_images_and_labels(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    parquet = _pyarrow_parquet()
    from pyarrow import ArrowException

    try:
        table = parquet.ParquetFile(file)
        column = _image_column(table.schema_arrow.names)
        batches = table.iter_batches(batch_size=64, columns=[column, PARQUET_LABEL])
        # Row by row from small batches, because a row group may hold a gigabyte of images.
        for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
            image, label = row[column], row[PARQUET_LABEL]
            image = image["bytes"] if isinstance(image, dict) else image
            if not isinstance(image, bytes) or not isinstance(label, int):
                raise ValueError(f"row {number} has no {'label' if image else 'image bytes'}")
            yield image, label
    except ArrowException as e:
        raise ValueError(f"it cannot be read as Parquet ({str(e).splitlines()[0]})") from None


def _image_column(names: list[str]) -> str:
    found = [name for name in PARQUET_IMAGES if name in names]
    if not found or PARQUET_LABEL not in names:
        raise ValueError(f"it has the columns {', '.join(names)}; needed are image (or img) and label")
    return found[0]


def _parquet_classes(url: str, obj: Object) -> tuple[str, ...] | None:
    """The class names that Hugging Face's datasets library has written into the file's schema, if any."""
    parquet = _pyarrow_parquet()
    from pyarrow import ArrowException

    with open_store(url).open(obj.name) as file:
        try:
            metadata = parquet.ParquetFile(file).schema_arrow.metadata or {}
        except ArrowException:
            raise UserError(f"{url}/{obj.name} cannot be read as Parquet; is it cut off?") from None
    features = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = features.get(PARQUET_LABEL, {}).get("names")
    return tuple(names) if names else None


def _pyarrow_parquet() -> Any:
    try:
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise UserError("Parquet needs pyarrow: pip install 'podlaunch[parquet]'") from None
    return parquet
