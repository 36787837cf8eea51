"""Where run directories lie, a folder or a gs:// prefix: the few operations that rundir.py needs of either.

A run is held by one launcher at a time: with a lock on a file of the folder, which goes with the process;
on gs:// with a lease, an object that its holder renews and that others take over when it is not.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import gethostname
from typing import IO, Any, Protocol
from uuid import uuid4

from configs import google
from configs.errors import UserError
from configs.files import write_atomically

ROLES = "the role Storage Object User on the bucket"
LOCK, LEASE = ".lock", "lease.json"
# What was read this long ago is not asked for again: a supervisor looks ten times a second.
FRESH_SECONDS = 2.0
RENEW_SECONDS = 5.0
# Not renewed for so long, by the clock of whoever wants it, a lease is void.
LEASE_SECONDS = 30.0
LOOK_SECONDS = 1.0
# Launchers' clocks are taken to agree within this.
CLOCK_SECONDS = 90.0
PATIENCE_SECONDS = 600.0


class Held(Exception):  # noqa: N818
    """Another launcher has the run; who, if that is known."""


class Unreachable(UserError):  # noqa: N818
    """The bucket does not answer. Later it may."""


class Files(Protocol):
    """The files of one run, by their names below its directory."""

    place: str

    def read(self, name: str) -> str | None:
        """Its content; None where there is none."""
        ...

    def read_from(self, name: str, offset: int) -> bytes:
        """What a growing file has from `offset` on; nothing where there is none."""
        ...

    def write(self, name: str, content: str | bytes) -> None:
        """Replace it whole. Raises UserError where nothing can be written."""
        ...

    def delete(self, name: str) -> None:
        """A file, or all below a folder; absent is fine."""
        ...

    def names(self, folder: str = "") -> list[str]:
        """Of the files and folders in a folder."""
        ...

    def refresh(self) -> None:
        """Forget what was read."""
        ...

    def locked(self, patience_seconds: float) -> Any:
        """A context in which this process holds the run. Raises Held."""
        ...

    def is_held(self) -> bool:
        """Whether some launcher holds the run."""
        ...

    def is_lost(self, *, look: bool = False) -> bool:
        """Whether another launcher has taken the run from this one, which held it; `look`: as of now."""
        ...


def files(place: str) -> Files:
    return Bucket(place) if place.startswith("gs://") else Folder(Path(place))


def children(root: str) -> list[str]:
    """Places of the runs below `root`, the one launched last first."""
    if root.startswith("gs://"):
        plans = Bucket(root).plans()
        return [f"{root.rstrip('/')}/{name}" for name in plans]
    found = sorted(Path(root).glob("*/plan.json"), key=lambda p: p.stat().st_mtime, reverse=True)
    return [str(p.parent) for p in found]


class Folder:
    def __init__(self, path: Path):
        self.place, self._path = str(path), path

    def read(self, name: str) -> str | None:
        try:
            return (self._path / name).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_from(self, name: str, offset: int) -> bytes:
        try:
            with (self._path / name).open("rb") as f:
                f.seek(offset)
                return f.read()
        except FileNotFoundError:
            return b""

    def write(self, name: str, content: str | bytes) -> None:
        with self._writing():
            (self._path / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path / name, content)

    def delete(self, name: str) -> None:
        path = self._path / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with self._writing(), suppress(FileNotFoundError):
                path.unlink()

    def names(self, folder: str = "") -> list[str]:
        try:
            return sorted(p.name for p in (self._path / folder).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def refresh(self) -> None:
        pass

    @contextmanager
    def locked(self, patience_seconds: float) -> Iterator[None]:
        with self._writing():
            self._path.mkdir(parents=True, exist_ok=True)
            f = (self._path / LOCK).open("w")
        with f:
            if not _flock(f, patience_seconds):
                raise Held
            yield

    def is_held(self) -> bool:
        try:
            with (self._path / LOCK).open("r") as f:
                fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # there is none, or a file system has no locks
            return False
        return False

    def is_lost(self, *, look: bool = False) -> bool:
        return False

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise UserError(
                f"run directory {self._path} cannot be written: {e.strerror}; choose another place with --root"
            ) from None


def _flock(file: IO[str], patience_seconds: float) -> bool:
    """Take the lock. Some tries: `launch list` holds it, too, for the instant in which it looks."""
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            return True  # some parallel file systems have no locks
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)


class Bucket:
    def __init__(self, place: str):
        self.place = place.rstrip("/")
        self._name, self._prefix = google.bucket_and_prefix(self.place)
        with self._explained():
            self._bucket = google.client().bucket(self._name)
        self._seen: dict[str, tuple[float, str | None]] = {}
        self._listed: dict[str, tuple[float, list[str]]] = {}
        self._lease: _Lease | None = None

    def read(self, name: str) -> str | None:
        """Of an unreachable bucket: what was last read there, if anything was."""
        at, text = self._seen.get(name, (None, None))
        if at is not None and time.monotonic() - at < FRESH_SECONDS:
            return text
        try:
            text = self._download(name)
        except Unreachable:
            if at is None:
                raise
        self._seen[name] = (time.monotonic(), text)
        return text

    def _download(self, name: str) -> str | None:
        from google.api_core.exceptions import NotFound

        with self._explained():
            try:
                return str(self._blob(name).download_as_text(retry=google.retry()))
            except NotFound:
                self._check_exists()
                return None

    def _check_exists(self) -> None:
        """An absent object and an absent bucket are both 404. Raises NotFound for the bucket, once."""
        if not self._seen:
            next(
                iter(self._bucket.list_blobs(prefix=self._prefix, max_results=1, retry=google.retry())), None
            )

    def read_from(self, name: str, offset: int) -> bytes:
        from google.api_core.exceptions import NotFound, RequestRangeNotSatisfiable

        with self._explained(), suppress(NotFound, RequestRangeNotSatisfiable):
            return bytes(self._blob(name).download_as_bytes(start=offset, retry=google.retry()))
        return b""

    def write(self, name: str, content: str | bytes) -> None:
        """Patient where the bucket is out of reach: a laptop may be."""
        if isinstance(content, str):
            self._seen[name] = (time.monotonic(), content)
        self._listed.clear()
        with self._explained():
            self._blob(name).upload_from_string(content, retry=google.retry(PATIENCE_SECONDS))

    def delete(self, name: str) -> None:
        from google.api_core.exceptions import NotFound

        with self._explained():
            blobs = [self._blob(name), *self._list(f"{name}/")]
            for blob in blobs:
                with suppress(NotFound):
                    blob.delete(retry=google.retry(PATIENCE_SECONDS))
        self._listed.clear()
        for seen in self._seen.copy():  # other threads read meanwhile
            if seen == name or seen.startswith(f"{name}/"):
                self._seen.pop(seen, None)

    def names(self, folder: str = "") -> list[str]:
        at, names = self._listed.get(folder, (None, []))
        if at is not None and time.monotonic() - at < FRESH_SECONDS:
            return names
        prefix = f"{self._prefix}{folder}/" if folder else self._prefix
        with self._explained():
            listing = self._bucket.list_blobs(prefix=prefix, delimiter="/", retry=google.retry())
            files = [blob.name.removeprefix(prefix) for blob in listing]
            names = sorted([*files, *(p.removeprefix(prefix).rstrip("/") for p in listing.prefixes)])
        self._listed[folder] = (time.monotonic(), names)
        return names

    def plans(self) -> list[str]:
        """Names of the runs below this place, the one launched last first."""
        with self._explained():
            # The service leaves out most of what lies below, such as checkpoints.
            listing = self._bucket.list_blobs(
                match_glob="**/plan.json", retry=google.retry(), prefix=self._prefix or None
            )
            found = sorted(listing, key=lambda blob: blob.updated, reverse=True)
        names = [blob.name.removeprefix(self._prefix) for blob in found]
        return [name.removesuffix("/plan.json") for name in names if re.fullmatch(r"[^/]+/plan\.json", name)]

    def refresh(self) -> None:
        self._listed.clear()
        self._seen = {name: (-FRESH_SECONDS, text) for name, (_, text) in self._seen.copy().items()}

    @contextmanager
    def locked(self, patience_seconds: float) -> Iterator[None]:
        with self._explained():
            self._lease = _Lease(self._bucket, self._prefix + LEASE)
            self._lease.take()
        self.refresh()  # the holder before may have written meanwhile
        try:
            yield
        finally:
            self._lease.give_back()

    def is_held(self) -> bool:
        with self._explained():
            blob = self._bucket.get_blob(self._prefix + LEASE, retry=google.retry())
        return blob is not None and time.time() - blob.updated.timestamp() < LEASE_SECONDS

    def is_lost(self, *, look: bool = False) -> bool:
        if self._lease is None:
            return False
        if look:
            with suppress(*google.errors()):
                self._lease.renew()
        return self._lease.is_lost

    def _list(self, below: str) -> list[Any]:
        return list(self._bucket.list_blobs(prefix=self._prefix + below, retry=google.retry()))

    def _blob(self, name: str) -> Any:
        return self._bucket.blob(self._prefix + name)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            with google.explained(f"run directory {self.place}", bucket=self._name, roles=ROLES):
                yield
        except google.UnreachableError as e:
            raise Unreachable(f"{e}; try again") from None


class _Lease:
    """An object that its holder renews, on the condition that nobody else has replaced it meanwhile."""

    def __init__(self, bucket: Any, name: str):
        self._bucket, self._name = bucket, name
        self._generation = 0
        self._text = json.dumps({"host": gethostname(), "pid": os.getpid(), "id": uuid4().hex})
        self._released = threading.Event()
        self._lock = threading.Lock()
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)
        self.is_lost = False

    def take(self) -> None:
        """Raises Held where another launcher renews it: clocks may differ, so that is waited for."""
        watched, deadline = 0, 0.0
        while not self._put():
            found = self._look()
            if found is None:  # given back meanwhile
                self._generation = 0
                continue
            if not watched:
                watched, deadline = found.generation, time.monotonic() + LEASE_SECONDS
            if found.generation != watched:
                holder = json.loads(self._read(found) or "{}")
                raise Held(f"process {holder['pid']} on {holder['host']}" if holder else "")
            age = time.time() - found.updated.timestamp()
            if age > LEASE_SECONDS + CLOCK_SECONDS or time.monotonic() > deadline:
                self._generation = watched
            else:
                time.sleep(LOOK_SECONDS)
        self._renewing.start()

    def give_back(self) -> None:
        self._released.set()
        self._renewing.join()
        if not self.is_lost:
            with suppress(*google.errors()):  # it ends by itself
                self._bucket.delete_blob(
                    self._name, if_generation_match=self._generation, retry=google.retry()
                )

    def _renew(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            with suppress(*google.errors()):  # nobody else is heard of either
                self.renew()
                if self.is_lost:
                    return

    def renew(self) -> None:
        """Also before what a launcher may do that holds the run: this machine may have slept since the last time."""
        with self._lock:
            self.is_lost = self.is_lost or not self._put()

    def _put(self) -> bool:
        """Write it, unless another has since it was of our generation (0: there is none)."""
        from google.api_core.exceptions import PreconditionFailed

        blob = self._bucket.blob(self._name)
        try:
            blob.upload_from_string(
                self._text, "application/json", if_generation_match=self._generation, retry=google.retry()
            )
        except PreconditionFailed:
            found = self._look()
            if found is None or self._read(found) != self._text:
                return False
            blob = found  # written after all, by a request whose answer was lost
        self._generation = blob.generation
        return True

    def _look(self) -> Any:
        """What is there now, or None. A blob that was read before stands for that generation alone."""
        return self._bucket.get_blob(self._name, retry=google.retry())

    def _read(self, found: Any) -> str | None:
        """None where it has been replaced meanwhile."""
        from google.api_core.exceptions import NotFound

        with suppress(NotFound):
            return str(found.download_as_text(retry=google.retry()))
        return None
