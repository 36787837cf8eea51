"""WebDataset tars, read in place: neighbouring members with the same key are one sample.

The key is a member's path up to the first dot of its base name; the extension says what the member holds
(https://github.com/webdataset/webdataset#the-webdataset-format).
"""

import json
import tarfile
from collections.abc import Iterator
from itertools import groupby
from typing import BinaryIO

from trainer.data.storage.formats.protocol import ScannedRecord

SUFFIXES = (".tar",)
FRAMING = None
IMAGES = {"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff"}


def scan(file: BinaryIO) -> Iterator[ScannedRecord]:
    """The records of a shard, as Format.scan says."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            # Hidden files are left behind by macOS's tar.
            files = (m for m in tar if m.isfile() and not m.name.rpartition("/")[2].startswith("."))
            for key, members in groupby(files, key=lambda member: _split(member.name)[0]):
                yield _sample(file, key, list(members))
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every member in memory
            _check_end(file, tar.offset)
    except tarfile.TarError as e:
        raise ValueError(f"it is no tar file, or is cut off at byte {file.seek(0, 2):,} ({e})") from None


def _split(name: str) -> tuple[str, str]:
    """The key and the extension of a member's name."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _sample(file: BinaryIO, key: str, members: list[tarfile.TarInfo]) -> ScannedRecord:
    extensions = [_split(m.name)[1] for m in members]
    images = [m for extension, m in zip(extensions, members, strict=True) if extension in IMAGES]
    if len(images) != 1:
        raise ValueError(f"sample {key!r} has {len(images)} images (it holds {', '.join(extensions)})")
    label = _label(file, key, dict(zip(extensions, members, strict=True)))
    return ScannedRecord(images[0].offset_data, images[0].size, label, _read(file, images[0]))


def _label(file: BinaryIO, key: str, members: dict[str, tarfile.TarInfo]) -> int:
    try:
        if "cls" in members:
            return int(_read(file, members["cls"]))
        if "json" in members:
            fields = json.loads(_read(file, members["json"]))
            label = fields["label"] if "label" in fields else fields["cls"]
            if type(label) in (int, str):  # int() would accept 2.7 and true, too
                return int(label)
            raise TypeError
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"sample {key!r}: its label is no whole number") from None
    raise ValueError(f"sample {key!r} has no label: neither .cls nor .json (it holds {', '.join(members)})")


def _read(file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    content = file.read(member.size)
    if len(content) < member.size:
        raise ValueError(f"it is cut off in {member.name} at byte {member.offset_data:,}")
    return content


def _check_end(file: BinaryIO, at: int) -> None:
    """Raise ValueError unless the archive ends at byte `at`.

    tarfile takes any bytes that are no header for the end of the archive; the true end is a block of zeros.
    """
    file.seek(at)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise ValueError(
            f"it is damaged or cut off at byte {at:,}: neither a member nor the end of the archive"
        )
