"""The cache folder, temporary folders that outlive no process, and atomic writes of files that other processes read.

In configs/ because launcher/ and trainer/ both need it and may not import each other.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from configs.errors import UserError


def cache_folder() -> Path:
    """Folder for files that podlaunch can create again: $XDG_CACHE_HOME/podlaunch, by default ~/.cache/podlaunch."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "podlaunch"


@contextlib.contextmanager
def temporary_folder(
    kind: str, below: Path | None = None, end: Callable[[Path], None] = lambda folder: None
) -> Iterator[Path]:
    """A folder of this process, in one place for each user, which nobody else can enter.

    It ends with the context, and, where the process was killed, when the next begins one of its `kind`; `end` is
    called with a folder before it is removed. Raises UserError where the place is another user's.
    """
    place = _own_folder((below or Path(tempfile.gettempdir())) / f"podlaunch-{os.getuid()}")
    for lock in place.glob(f"{kind}-*.lock"):
        _remove_stale(lock, end)
    lock, held = _locked(place, kind)
    folder = lock.with_suffix("")
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        _remove(folder, lock, end)
        held.close()


def _own_folder(place: Path) -> Path:
    with contextlib.suppress(FileExistsError):
        place.mkdir(mode=0o700)
    # Its parent is open to all users, one of whom may have made it first.
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise UserError(f"{place} is not a folder of yours alone: remove it, or have its owner remove it")
    return place


def _locked(place: Path, kind: str) -> tuple[Path, IO[str]]:
    """A new lock file. The lock ends with this process, and so tells others whether it lives."""
    while True:
        lock = place / f"{kind}-{secrets.token_hex(3)}.lock"
        file = lock.open("w")
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return lock, file
        file.close()  # another process took it for a stale one in between


def _remove_stale(lock: Path, end: Callable[[Path], None]) -> None:
    """Remove what a process has left that was killed; nothing where it lives."""
    with contextlib.suppress(OSError), lock.open("r") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(lock.with_suffix(""), lock, end)


def _remove(folder: Path, lock: Path, end: Callable[[Path], None]) -> None:
    if folder.is_dir():
        end(folder)
        shutil.rmtree(folder, ignore_errors=True)
    lock.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the file at `path` by `content`. A reader sees the old file or the new one, never a part, even after
    this process is killed. Raises OSError.
    """
    # In the same folder, because a rename is atomic only within a file system.
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)
