"""The files of a run directory, in a folder or under gs://: the few operations that the run directory needs.

One launcher at a time holds a run: in a folder by a lock on a file, which ends with the process, and under
gs:// by a lease.
"""

import errno
import fcntl
import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

from configs import google
from configs.errors import UserError
from configs.files import write_atomically
from launcher.rundir import lease

ROLES = "the role Storage Object User on the bucket"
LOCK = ".lock"
# A supervisor reads stop requests and reports ten times a second, which would be as many requests to the bucket.
CACHE_SECONDS = 2.0
# A laptop may be out of reach for a while, and a write that fails ends its launcher.
WRITE_RETRY_SECONDS = 600.0
LOCK_POLL_SECONDS = 0.05


class BucketUnreachableError(UserError):
    """The bucket does not answer now; it may answer later."""


class Files(Protocol):
    """The files of one run, by their names below its directory."""

    location: str

    def read(self, name: str) -> str | None:
        """The content of a file; None where there is no such file."""

    def read_from(self, name: str, offset: int) -> bytes:
        """The content of a growing file from byte `offset` on; empty where there is no such file."""

    def write(self, name: str, content: str | bytes) -> None:
        """Replace a file as a whole. Raises UserError where nothing can be written."""

    def delete(self, name: str) -> None:
        """Delete a file, or all files below a folder, if there are any."""

    def names(self, folder: str = "") -> list[str]:
        """Names of the files and folders in a folder."""

    def refresh(self) -> None:
        """Have the next reads and listings answer as of now."""

    def locked(self, timeout_seconds: float) -> AbstractContextManager[None]:
        """A context in which this process holds the run, as soon as it is free. Raises HeldError."""

    def is_held(self) -> bool:
        """Whether some launcher holds the run."""

    def is_lost(self, *, refresh: bool = False) -> bool:
        """Whether another launcher has taken the run over from this one; `refresh`: ask anew, not by the last renewal."""


def read_object(files: Files, name: str) -> dict[str, Any]:
    """The JSON object in a file, empty where there is no such file. Raises UserError where it is something else."""
    text = files.read(name)
    try:
        value = json.loads(text) if text else {}
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(
            f"{files.location}/{name} is not what podlaunch writes: {text!r:.80}; delete it, or the run"
        )
    return value


def open_files(location: str) -> Files:
    return Bucket(location) if location.startswith("gs://") else Folder(Path(location))


def list_plans(*roots: str) -> list[str]:
    """Locations of the run directories below `roots` that have a plan, the newest first."""
    found: list[tuple[float, str]] = []
    for root in roots:
        if root.startswith("gs://"):
            found += [(written, f"{root.rstrip('/')}/{name}") for written, name in Bucket(root).plans()]
        else:
            for plan in Path(root).glob("*/plan.json"):
                with suppress(OSError):  # deleted meanwhile, or in the folder of another user
                    found.append((plan.stat().st_mtime, str(plan.parent)))
    return [location for _, location in sorted(found, key=lambda entry: entry[0], reverse=True)]


class Folder:
    def __init__(self, path: Path):
        self.location, self._path = str(path), path

    def read(self, name: str) -> str | None:
        with self._reading():
            try:
                return (self._path / name).read_text(encoding="utf-8")
            except (FileNotFoundError, NotADirectoryError):
                return None

    def read_from(self, name: str, offset: int) -> bytes:
        with self._reading():
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
        with self._reading():
            try:
                return sorted(p.name for p in (self._path / folder).iterdir())
            except (FileNotFoundError, NotADirectoryError):
                return []

    def refresh(self) -> None:
        pass

    @contextmanager
    def locked(self, timeout_seconds: float) -> Iterator[None]:
        with self._writing():
            self._path.mkdir(parents=True, exist_ok=True)
            f = (self._path / LOCK).open("w")
        with f:
            if not _flock(f, timeout_seconds):
                raise lease.HeldError
            yield

    def is_held(self) -> bool:
        try:
            with (self._path / LOCK).open("r") as f:
                fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # there is no lock file, or the file system has no locks
            return False
        return False

    def is_lost(self, *, refresh: bool = False) -> bool:
        return False

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except PermissionError as e:
            raise UserError(f"run directory {self._path} cannot be read: {e.strerror}") from None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            problem = f"run directory {self._path} cannot be written: {e.strerror}"
            raise UserError(f"{problem}; choose another place with --root") from None


def _flock(file: IO[str], timeout_seconds: float) -> bool:
    """Take the lock, with some tries: `launch list` also holds it, for the instant in which `is_held` asks."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            pass
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            return True  # some parallel file systems have no locks, and a run there is better than none
        if time.monotonic() > deadline:
            return False
        time.sleep(LOCK_POLL_SECONDS)


class Bucket:
    def __init__(self, location: str):
        self.location = location.rstrip("/")
        self._name, self._prefix = google.bucket_and_prefix(self.location)
        with self._explained():
            self._bucket = google.client().bucket(self._name)
        # What was read and listed, each with the time. Threads share them.
        self._contents: dict[str, tuple[float, str | None]] = {}
        self._listings: dict[str, tuple[float, list[str]]] = {}
        self._lease: lease.Lease | None = None

    def read(self, name: str) -> str | None:
        """As `Files.read`; of an unreachable bucket the content that was read last, if any was."""
        read_at, text = self._contents.get(name, (None, None))
        if read_at is not None and time.monotonic() - read_at < CACHE_SECONDS:
            return text
        try:
            text = self._download(name)
        except BucketUnreachableError:
            if read_at is None:
                raise
        self._contents[name] = (time.monotonic(), text)
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
        """Raises NotFound where the bucket is absent: for an object, the service gives the same answer in both cases."""
        if not self._contents:  # once is enough
            list(self._bucket.list_blobs(prefix=self._prefix, max_results=1, retry=google.retry()))

    def read_from(self, name: str, offset: int) -> bytes:
        from google.api_core.exceptions import NotFound, RequestRangeNotSatisfiable

        with self._explained(), suppress(NotFound, RequestRangeNotSatisfiable):
            return bytes(self._blob(name).download_as_bytes(start=offset, retry=google.retry()))
        return b""

    def write(self, name: str, content: str | bytes) -> None:
        """As `Files.write`; retried for ten minutes, since a laptop may be out of reach for a while."""
        if isinstance(content, str):
            self._contents[name] = (time.monotonic(), content)
        self._listings.clear()
        with self._explained():
            self._blob(name).upload_from_string(content, retry=google.retry(WRITE_RETRY_SECONDS))

    def delete(self, name: str) -> None:
        from google.api_core.exceptions import NotFound

        prefix = f"{self._prefix}{name}/"
        with self._explained():
            below = self._bucket.list_blobs(prefix=prefix, retry=google.retry())
            for blob in (self._blob(name), *below):
                with suppress(NotFound):
                    blob.delete(retry=google.retry(WRITE_RETRY_SECONDS))
        self._listings.clear()
        for cached in self._contents.copy():  # a copy, since other threads read meanwhile
            if cached == name or cached.startswith(f"{name}/"):
                self._contents.pop(cached, None)

    def names(self, folder: str = "") -> list[str]:
        listed_at, names = self._listings.get(folder, (None, []))
        if listed_at is not None and time.monotonic() - listed_at < CACHE_SECONDS:
            return names
        prefix = f"{self._prefix}{folder}/" if folder else self._prefix
        with self._explained():
            listing = self._bucket.list_blobs(prefix=prefix, delimiter="/", retry=google.retry())
            files = [blob.name.removeprefix(prefix) for blob in listing]
            names = sorted([*files, *(p.removeprefix(prefix).rstrip("/") for p in listing.prefixes)])
        self._listings[folder] = (time.monotonic(), names)
        return names

    def plans(self) -> list[tuple[float, str]]:
        """When the plan of each run below this location was written, and the run's name."""
        with self._explained():
            # The pattern is matched by the service, so checkpoints and logs are not listed.
            prefix, pattern = self._prefix or None, "**/plan.json"
            listing = self._bucket.list_blobs(prefix=prefix, match_glob=pattern, retry=google.retry())
            plans = [(blob.updated.timestamp(), blob.name.removeprefix(self._prefix)) for blob in listing]
        return [(at, n.removesuffix("/plan.json")) for at, n in plans if re.fullmatch(r"[^/]+/plan\.json", n)]

    def refresh(self) -> None:
        self._listings.clear()
        self._contents = {name: (-CACHE_SECONDS, text) for name, (_, text) in self._contents.copy().items()}

    @contextmanager
    def locked(self, timeout_seconds: float) -> Iterator[None]:
        with self._explained():
            self._lease = lease.Lease(self._bucket, self._prefix + lease.LEASE)
            self._lease.take()
        self.refresh()  # the holder before this one may have written meanwhile
        try:
            yield
        finally:
            self._lease.release()

    def is_held(self) -> bool:
        with self._explained():
            return lease.is_held(self._bucket, self._prefix + lease.LEASE)

    def is_lost(self, *, refresh: bool = False) -> bool:
        if self._lease is None:
            return False
        if refresh:
            with suppress(*google.errors()):  # out of reach of the bucket, the last answer stands
                self._lease.renew()
        return self._lease.is_lost

    def _blob(self, name: str) -> Any:
        return self._bucket.blob(self._prefix + name)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            with google.explained(f"run directory {self.location}", bucket=self._name, roles=ROLES):
                yield
        except google.UnreachableError as e:
            raise BucketUnreachableError(f"{e}; try again") from None
