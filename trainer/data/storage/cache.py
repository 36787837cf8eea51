"""Blocks that were read from a bucket, kept on a local disk for later epochs and runs: one file a block.

A file appears complete, by a rename, and its name depends on all that decides its content. So processes share
a folder without locks, and a killed process leaves nothing that needs repair. The reader verifies each record
that it uses.
"""

import contextlib
import hashlib
import logging
import os
import threading
import time
from pathlib import Path

import numpy as np

from trainer.data.storage.request import RangeRequest

_log = logging.getLogger(__name__)
PARTIAL = ".partial"
STALE_PARTIAL_SECONDS = 3600
"""A partial file that is older was left by a process that no longer runs."""
RESCAN_SHARE = 1 / 32
"""Other processes' files are counted again after this share of `max_bytes` has been written."""


class BlockCache:
    """The payloads of blocks in `folder`, up to `max_bytes`; the least recently used is removed first.

    Raises OSError if the folder cannot be created or read.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self._folder, self._max_bytes = folder, max_bytes
        self._lock = threading.Lock()
        self._num_written = 0
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob(f"*{PARTIAL}"):
            with contextlib.suppress(FileNotFoundError):  # another process may remove it first
                if time.time() - file.stat().st_mtime > STALE_PARTIAL_SECONDS:
                    file.unlink()
        self._total = self._written = self._writing = 0
        self._evict()

    def contains(self, block: RangeRequest) -> bool:
        """Whether the block is there, complete."""
        try:
            # A file that was cut off, as by a crash of the machine, has another size.
            return self._file(block).stat().st_size == block.payload_bytes()
        except FileNotFoundError:
            return False

    def read(self, part: RangeRequest) -> np.ndarray | None:
        """The payload of a part of a block, uint8 (bytes,), or None where the file is missing or cannot be read."""
        block = part.whole_block()
        try:
            with self._file(block).open("rb") as f:
                os.utime(f.fileno())  # the time of the last use, by which blocks are removed
                return np.fromfile(f, np.uint8, part.payload_bytes(), offset=part.payload_offset_in(block))
        except OSError:
            return None

    def write(self, block: RangeRequest, payload: np.ndarray) -> None:
        """Write a block. If the disk is full or broken, only this file is lost, and a warning says so."""
        size = len(payload)
        with self._lock:
            self._num_written += 1
            partial = self._folder / f"{os.getpid()}-{self._num_written}{PARTIAL}"
            # Counted before it is written, so that several threads do not exceed the bound together.
            self._writing += size
        try:
            with self._lock:
                full = self._total + self._writing > self._max_bytes
                if full or self._written > self._max_bytes * RESCAN_SHARE:
                    self._evict()
            payload.tofile(partial)
            partial.replace(self._file(block))
        except OSError as e:
            partial.unlink(missing_ok=True)
            _log.warning("data.cache: %s", e)
        finally:
            with self._lock:
                self._writing -= size
                self._total += size
                self._written += size

    def delete(self, block: RangeRequest) -> None:
        """Remove a block that has turned out to be damaged."""
        self._file(block).unlink(missing_ok=True)

    def _file(self, block: RangeRequest) -> Path:
        identity = (
            f"{block.store.url}/{block.object.name}/{block.object.generation}/{block.offset}/{block.length}"
        )
        # Hashed, because an address may have characters and lengths that a file's name may not.
        return self._folder / hashlib.sha256(identity.encode()).hexdigest()[:40]

    def _evict(self) -> None:
        """Count the files of all processes, and remove those that were not used for longest."""
        files = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another process may have removed it
                    stat = entry.stat()
                    files.append((stat.st_mtime, stat.st_size, entry.path))
        self._total, self._written = sum(size for _, size, _ in files), 0
        # Other processes may write a share of the bound before this one counts again.
        room = self._max_bytes * (1 - RESCAN_SHARE) - self._writing
        for _, size, path in sorted(files):
            if self._total <= room:
                break
            # Another process may be writing it.
            if not path.endswith(PARTIAL):
                Path(path).unlink(missing_ok=True)
                self._total -= size
