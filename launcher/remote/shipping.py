"""The code for hosts without a shared disk: an archive, and the part of it that is missing on a host.

The archive is kept with the run, so that any machine can resume the run after the working tree has changed.
"""

import hashlib
import io
import json
import os
import subprocess
import tarfile
import zlib
from functools import cached_property
from pathlib import Path

import podlaunch
from configs.errors import UserError
from launcher.host.bootstrap import MANIFEST
from launcher.machine.provenance import digest
from podlaunch import HOME

LOCK = "requirements-tpu.txt"
SETUP = "deploy/tpu/environment.sh"
# What SETUP needs beside itself.
INTERPRETER = ("deploy/tpu/interpreter.py", "deploy/tpu/interpreter.json")
STARTUP = "deploy/tpu/startup.sh"


def startup_script() -> str:
    """What each VM runs when it starts; empty where podlaunch was installed without it."""
    file = HOME / STARTUP
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def pack(max_mib: float, home: Path = HOME) -> bytes:
    """The working tree as a tar: tracked files, and untracked ones that git does not ignore.

    Raises UserError where the tree is larger than `max_mib` MiB.
    """
    files = _files(home)
    sizes = {name: file.stat().st_size for name, file in files.items()}
    if (total := sum(sizes.values())) > max_mib * 2**20:
        largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:3]
        raise UserError(
            f"the code in {home} has {total / 2**20:.0f} MiB, above max_code_mib = {max_mib:g}; the largest files are "
            f"{', '.join(largest)}: add files that the hosts do not need to .gitignore, or raise max_code_mib"
        )
    packed = io.BytesIO()
    # Dereferenced: of two hard links, too, each becomes a file.
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=6, dereference=True) as tar:
        for name, file in files.items():
            tar.add(file, arcname=name, recursive=False, filter=_without_owner)
    return packed.getvalue()


def _without_owner(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Names and numbers of this machine's users mean nothing on another."""
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


class CodeArchive:
    """The files of an archive, in memory: on this machine nothing of it is written, and nothing runs."""

    def __init__(self, packed: bytes):
        self._packed = packed

    @cached_property
    def _contents(self) -> dict[str, tuple[tarfile.TarInfo, bytes]]:
        try:
            with tarfile.open(fileobj=io.BytesIO(self._packed)) as tar:
                return {entry.name: (entry, _content(tar, entry)) for entry in tar}
        except (tarfile.TarError, EOFError, OSError, zlib.error) as e:
            raise UserError(f"the code of the run cannot be unpacked: {e}; `launch` the run anew") from None

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 by path."""
        return {name: hashlib.sha256(content).hexdigest() for name, (_, content) in self._contents.items()}

    @cached_property
    def provenance(self) -> str:
        """The digest of the code, as a host that has these files computes it."""
        return digest({name: content for name, (_, content) in self._contents.items()})

    @property
    def has_environment(self) -> bool:
        """Whether the archive has the files from which a host makes its Python."""
        return {LOCK, SETUP, *INTERPRETER} <= self.digests.keys()

    def delta(self, present: dict[str, str]) -> bytes | None:
        """A tar of the files that a host is missing; None where it has all. `present`: the digests of what it has."""
        missing = [name for name, digest in self.digests.items() if present.get(name) != digest]
        if not missing and present.keys() - {MANIFEST} == self.digests.keys():
            return None
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=6) as tar:
            listing = json.dumps([*self.digests, MANIFEST]).encode()
            entry = tarfile.TarInfo(MANIFEST)
            entry.size = len(listing)
            tar.addfile(entry, io.BytesIO(listing))
            for name in missing:
                entry, content = self._contents[name]
                tar.addfile(entry, io.BytesIO(content))
        return packed.getvalue()


def _content(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(entry) if entry.isfile() else None
    # The archive comes back from the run directory, where others may have put another.
    if file is None or entry.name.startswith("/") or ".." in entry.name.split("/"):
        raise tarfile.TarError(f"{entry.name!r} is not a file below the folder of the code")
    return file.read()


def _files(home: Path) -> dict[str, Path]:
    """Files by their names in the archive: what git lists, or all code where `home` is no checkout."""
    if not (home / ".git").exists():  # an installed package may lie in somebody else's checkout
        return podlaunch.code(home)
    command = ["git", "-C", str(home), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = os.fsdecode(subprocess.run(command, capture_output=True).stdout).split("\0")
    except FileNotFoundError:
        listed = []
    files = {name: home / name for name in sorted(filter(None, listed))}
    # git also lists tracked files that are deleted, links and submodules.
    return {n: f for n, f in files.items() if f.is_file() and not f.is_symlink()} or podlaunch.code(home)
