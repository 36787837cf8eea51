"""The code that goes to hosts without a shared disk: an archive kept with the run, and the part of it that a host lacks.

Kept with the run, so that any machine can go on with it, whatever has become of the working tree meanwhile.
"""

import hashlib
import io
import json
import os
import subprocess
import tarfile
from functools import cached_property
from pathlib import Path

from configs.errors import UserError
from launcher.bootstrap import MANIFEST
from launcher.provenance import HOME, digest
from podlaunch import code

LOCK = "requirements-tpu.txt"
SETUP = "deploy/tpu/environment.sh"


def archive(max_mib: float, home: Path = HOME) -> bytes:
    """The working tree as a tar: tracked files, and untracked ones that git does not ignore.

    Raises UserError where it is larger than a host should get.
    """
    files = _listed(home)
    sizes = {name: file.stat().st_size for name, file in files.items()}
    if (total := sum(sizes.values())) > max_mib * 2**20:
        largest = sorted(sizes, key=lambda file: sizes[file], reverse=True)[:3]
        raise UserError(
            f"the code in {home} has {total / 2**20:.0f} MiB, above max_code_mib = {max_mib:g}; the largest files are "
            f"{', '.join(largest)}: have git ignore what the hosts do not need, or raise it"
        )
    packed = io.BytesIO()
    # Dereferenced: of two hard links, too, each is a file.
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=6, dereference=True) as tar:
        for name, file in files.items():
            tar.add(file, arcname=name, recursive=False, filter=_of_nobody)
    return packed.getvalue()


def _of_nobody(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Names and numbers of users here mean nothing there."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


class Code:
    """What an archive holds."""

    def __init__(self, packed: bytes):
        self._packed = packed

    @cached_property
    def _contents(self) -> dict[str, tuple[tarfile.TarInfo, bytes]]:
        with tarfile.open(fileobj=io.BytesIO(self._packed)) as tar:
            return {entry.name: (entry, _content(tar, entry)) for entry in tar}

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 by path."""
        return {name: hashlib.sha256(content).hexdigest() for name, (_, content) in self._contents.items()}

    @property
    def provenance(self) -> str:
        """What a host that has it finds its code to be."""
        return digest({name: content for name, (_, content) in self._contents.items()})

    @property
    def num_bytes(self) -> int:
        return sum(len(content) for _, content in self._contents.values())

    @property
    def has_environment(self) -> bool:
        """Whether a Python can be made from it."""
        return {LOCK, SETUP} <= self.digests.keys()

    def missing(self, there: dict[str, str]) -> bytes | None:
        """What a host must receive that has files of these digests, as a tar; None where nothing."""
        lacks = [name for name, digest in self.digests.items() if there.get(name) != digest]
        if not lacks and there.keys() - {MANIFEST} == self.digests.keys():
            return None
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=6) as tar:
            listing = json.dumps([*self.digests, MANIFEST]).encode()
            entry = tarfile.TarInfo(MANIFEST)
            entry.size = len(listing)
            tar.addfile(entry, io.BytesIO(listing))
            for name in lacks:
                entry, content = self._contents[name]
                tar.addfile(entry, io.BytesIO(content))
        return packed.getvalue()


def _content(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(entry)
    assert file is not None  # `_listed` gives files alone
    return file.read()


def _listed(home: Path) -> dict[str, Path]:
    """By git, or where this is no checkout all code of podlaunch; by their names in a checkout."""
    if not (home / ".git").exists():  # it may lie in somebody else's
        return code(home)
    command = ["git", "-C", str(home), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = os.fsdecode(subprocess.run(command, capture_output=True).stdout).split("\0")
    except FileNotFoundError:
        listed = []
    # Not what is deleted but still tracked, nor links and submodules.
    names = sorted({f for f in listed if f and (home / f).is_file() and not (home / f).is_symlink()})
    return {name: home / name for name in names} or code(home)
