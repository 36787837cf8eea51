"""The places where datasets are stored: a folder or a gs:// prefix, behind one interface.

Google's client lists, uploads and finds credentials. Content is read over the client's authorized session,
which takes a tenth of the CPU time of the client's own downloads.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, cast
from urllib.parse import quote

import google_crc32c

from configs import google
from configs.errors import UserError
from configs.files import write_atomically

if TYPE_CHECKING:
    from google.cloud.storage import Client

CONNECT_SECONDS = 5.0
"""Time limit for opening a connection."""
ROLES = "the role Storage Object Viewer on the bucket"
UPLOAD_SECONDS = 300.0
"""Time limit for uploading one object."""
CONNECTIONS = 32
"""Number of requests that may run at once."""
READS = 3
"""A small object that does not match its checksum is read this often."""
CHUNK_BYTES = 1 << 18
"""Size of the pieces in which content is received."""


@dataclass(frozen=True)
class Object:
    """One object of a store, as it was when it was listed."""

    name: str
    size: int
    generation: int
    """The GCS generation, or a file's modification time in ns: with another one the content is another, too."""
    crc32c: int | None
    """Checksum of the whole object, where the store knows it: GCS does, folders do not."""


class TransientError(google.UnreachableError):
    """A read that may succeed when repeated: an overloaded server, a broken connection, a body that is too short."""

    def __init__(self, message: str, *, throttled: bool = False):
        super().__init__(message)
        self.throttled = throttled


class AbandonedError(Exception):
    """The result of this read is no longer needed."""


ChunkCallback = Callable[[int], bool]
"""Called with the number of bytes of each piece received; returns whether to go on."""


class Store(Protocol):
    """The objects under one address, by their names relative to it."""

    url: str
    is_remote: bool
    """Whether a slow read may be slow by chance, so that a second one may be faster."""

    def list(self) -> list[Object]:
        """All objects, sorted by name. Raises UserError if the place cannot be read."""
        ...

    def open(self, name: str) -> BinaryIO:
        """A seekable file, for tools that scan whole objects."""
        ...

    def read(self, name: str) -> bytes:
        """The content of a small object. Raises FileNotFoundError."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Replace a small object at once, completely or not at all."""
        ...

    def upload(self, name: str, file: Path) -> None:
        """Move a local file here, verified by its checksum on the way."""
        ...

    def delete(self, name: str) -> None:
        """Remove an object, if it exists."""
        ...

    def fetch(self, obj: Object, offset: int, buffers: Sequence[memoryview], on_chunk: ChunkCallback) -> None:
        """Fill the buffers, one after another, with the bytes of `obj` from `offset` on.

        Raises TransientError, AbandonedError if `on_chunk` returns False, and UserError if the object
        has been replaced or removed, or may not be read.
        """
        ...


def open_store(url: str) -> Store:
    """The store at a folder or at gs://bucket/prefix. Raises UserError if the address is neither."""
    if url.startswith("gs://"):
        return Bucket(url)
    if "://" in url:
        raise UserError(f"{url}: data lies in a folder or under gs://")
    return Folder(Path(url))


def checksum(file: BinaryIO) -> int:
    """The crc32c (RFC 3720, appendix B.4) of a whole file, which is then rewound."""
    file.seek(0)
    crc = 0
    while part := file.read(1 << 20):
        crc = google_crc32c.extend(crc, part)
    file.seek(0)
    return crc


class Folder:
    """The files of a folder, without subfolders and hidden files."""

    is_remote = False

    def __init__(self, path: Path):
        self._path = path
        self.url = str(path)

    def list(self) -> list[Object]:
        if not self._path.is_dir():
            raise UserError(f"{self.url}: there is no such folder")
        try:
            files = sorted(p for p in self._path.iterdir() if p.is_file() and not p.name.startswith("."))
            return [self._object(p.name, p.stat()) for p in files]
        except PermissionError:
            raise UserError(f"{self.url}: no permission to read it") from None

    def open(self, name: str) -> BinaryIO:
        return (self._path / name).open("rb")

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path / name, content)

    def upload(self, name: str, file: Path) -> None:
        self._path.mkdir(parents=True, exist_ok=True)
        file.replace(self._path / name)

    def delete(self, name: str) -> None:
        (self._path / name).unlink(missing_ok=True)

    def fetch(self, obj: Object, offset: int, buffers: Sequence[memoryview], on_chunk: ChunkCallback) -> None:
        try:
            # Opened for each read, because thousands of shards would exceed the limit on open files.
            descriptor = os.open(self._path / obj.name, os.O_RDONLY)
        except FileNotFoundError:
            raise _gone_error(self.url, obj) from None
        except PermissionError:
            raise UserError(f"{self.url}/{obj.name}: no permission to read it") from None
        try:
            # By the open file, so that a replacement cannot come between the check and the read.
            if self._object(obj.name, os.fstat(descriptor)) != obj:
                raise _overwritten_error(self.url, obj)
            os.lseek(descriptor, offset, os.SEEK_SET)
            _read_vectored(descriptor, buffers, f"{self.url}/{obj.name}")
            on_chunk(sum(map(len, buffers)))
        except OSError as e:
            raise TransientError(f"{self.url}/{obj.name}: {e}") from None
        finally:
            os.close(descriptor)

    def _object(self, name: str, stat: os.stat_result) -> Object:
        return Object(name, stat.st_size, stat.st_mtime_ns, None)


def _read_vectored(descriptor: int, buffers: Sequence[memoryview], address: str) -> None:
    """Fill the buffers from a file's current position. Raises TransientError if the file ends before."""
    views = list(buffers)
    while views:
        num_read = os.readv(descriptor, views[:1024])  # 1,024 is IOV_MAX, the most that a call may have
        if num_read == 0:
            raise TransientError(f"{address}: ends {sum(map(len, views)):,} bytes early")
        while views and num_read >= len(views[0]):
            num_read -= len(views.pop(0))
        if num_read:
            views[0] = views[0][num_read:]


class Bucket:
    """The objects under gs://bucket/prefix, without those of deeper folders."""

    is_remote = True

    def __init__(self, url: str):
        name, self._prefix = google.bucket_and_prefix(url)
        self.url = url.rstrip("/")
        try:
            self._client = _client()
        except (ValueError, OSError) as e:  # DefaultCredentialsError is no ValueError
            raise google.NoAccessError(
                f"{url}: the Google credentials cannot be used: {google.first_line(e)}"
            ) from None
        self._bucket = self._client.bucket(name)
        self._session = _session(self._client)

    def list(self) -> list[Object]:
        with self._translate_errors():
            blobs = self._client.list_blobs(self._bucket, prefix=self._prefix, delimiter="/", **_options())
            return [
                Object(b.name.removeprefix(self._prefix), b.size, b.generation, google.crc32c(b))
                for b in blobs
                if b.name != self._prefix
            ]

    def open(self, name: str) -> BinaryIO:
        return cast(BinaryIO, self._blob(name).open("rb", retry=google.retry()))

    def read(self, name: str) -> bytes:
        from google.cloud.exceptions import NotFound
        from google.cloud.storage.exceptions import DataCorruption

        with self._translate_errors():
            for _ in range(READS):
                try:
                    return cast(bytes, self._blob(name).download_as_bytes(checksum="crc32c", **_options()))
                except DataCorruption:
                    continue
                except NotFound:
                    # A missing bucket is a 404, too. Listing it raises what is wrong with it.
                    next(iter(self._client.list_blobs(self._bucket, max_results=1, **_options())), None)
                    raise FileNotFoundError(f"{self.url}/{name}") from None
        raise TransientError(f"{self.url}/{name} does not match its checksum, {READS} times read")

    def write(self, name: str, content: bytes) -> None:
        with self._translate_errors():
            blob = self._blob(name)
            blob.upload_from_string(content, "application/octet-stream", checksum="crc32c", **_options())

    def upload(self, name: str, file: Path) -> None:
        with self._translate_errors():
            retry = google.retry(UPLOAD_SECONDS)
            self._blob(name).upload_from_filename(str(file), checksum="crc32c", retry=retry)
        file.unlink()

    def delete(self, name: str) -> None:
        from google.cloud.exceptions import NotFound

        with self._translate_errors(), contextlib.suppress(NotFound):
            self._blob(name).delete(**_options())

    def fetch(self, obj: Object, offset: int, buffers: Sequence[memoryview], on_chunk: ChunkCallback) -> None:
        import requests
        import urllib3
        from google.auth.exceptions import GoogleAuthError, TransportError

        address = f"{self.url}/{obj.name}"
        size = sum(len(view) for view in buffers)
        path = f"/download/storage/v1/b/{self._bucket.name}/o/{quote(self._prefix + obj.name, safe='')}"
        try:
            response = self._session.get(
                f"{self._client.api_endpoint}{path}",
                params={"alt": "media", "generation": obj.generation},
                # Not compressed: the range would then be one of the compressed bytes.
                headers={"Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"},
                stream=True,
                timeout=(CONNECT_SECONDS, google.READ_SECONDS),
            )
            with response:
                self._check(response, obj, address)
                _copy_body(response.raw, buffers, address, on_chunk)
        except (requests.RequestException, urllib3.exceptions.HTTPError, TransportError, OSError) as e:
            raise TransientError(f"{address}: {google.first_line(e)}") from None
        except GoogleAuthError as e:
            if google.is_passing(e):
                raise TransientError(f"{address}: no credentials now: {google.first_line(e)}") from None
            raise UserError(google.refused(address, e)) from None

    def _translate_errors(self) -> contextlib.AbstractContextManager[None]:
        """Google's errors as UserError for what the user must mend, and UnreachableError."""
        return google.explained(self.url, bucket=self._bucket.name, roles=ROLES)

    def _check(self, response: Any, obj: Object, address: str) -> None:
        """Raise what an HTTP response means for a range of `obj`; return if it is as asked for."""
        status = response.status_code
        if status in (408, 429) or status >= 500:
            raise TransientError(f"{address}: HTTP {status}", throttled=status == 429)
        if status in (401, 403):
            raise UserError(google.denied(address, status, ROLES))
        # The object may be gone or replaced. Which of the two is a small request away, and the user must
        # know.
        if status == 404:
            with self._translate_errors():
                blob = self._bucket.get_blob(self._prefix + obj.name, **_options())
            raise _gone_error(self.url, obj) if blob is None else _overwritten_error(self.url, obj)
        # Emulators of Cloud Storage may leave the header out.
        generation = response.headers.get("x-goog-generation")
        if generation is not None and int(generation) != obj.generation:
            raise _overwritten_error(self.url, obj)
        # 200 would bring the whole object, because a proxy has ignored the range.
        if status != 206:
            raise TransientError(f"{address}: HTTP {status} instead of 206 for a range")

    def _blob(self, name: str) -> Any:
        return self._bucket.blob(self._prefix + name)


def _copy_body(raw: Any, buffers: Sequence[memoryview], address: str, on_chunk: ChunkCallback) -> None:
    """Copy a response's body into the buffers. No other copy of these bytes is made in this process."""
    views = iter(buffers)
    view = next(views)
    while chunk := memoryview(raw.read(CHUNK_BYTES)):
        if not on_chunk(len(chunk)):
            raise AbandonedError
        while len(chunk) >= len(view):
            view[:] = chunk[: len(view)]
            chunk = chunk[len(view) :]
            following = next(views, None)
            if following is None:
                if len(chunk):
                    raise TransientError(f"{address}: the body is longer than asked for")
                return
            view = following
        view[: len(chunk)] = chunk
        view = view[len(chunk) :]
    raise TransientError(f"{address}: the body ends {sum(map(len, [view, *views])):,} bytes early")


def _client() -> "Client":
    """Google's client, with the credentials that it finds; anonymous, for public buckets, where there are none."""
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage

    try:
        return cast("Client", google.client())
    except DefaultCredentialsError as e:
        if os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
            raise ValueError(f"GOOGLE_APPLICATION_CREDENTIALS: {google.first_line(e)}") from None
        return storage.Client.create_anonymous_client()


def _options() -> dict[str, Any]:
    """Retries and time limit of the small requests that Google's client makes."""
    return {"retry": google.retry(), "timeout": google.READ_SECONDS}


def _session(client: "Client") -> Any:
    from google.auth.transport.requests import AuthorizedSession
    from requests.adapters import HTTPAdapter

    session = AuthorizedSession(client._credentials)
    for scheme in ("https://", "http://"):
        # No retries here: the Fetcher repeats requests, and counts them.
        # Twice the connections, since hedged requests come on top.
        session.mount(scheme, HTTPAdapter(pool_connections=1, pool_maxsize=2 * CONNECTIONS, max_retries=0))
    return session


def _gone_error(url: str, obj: Object) -> UserError:
    return UserError(f"{url}/{obj.name} is gone since the run began; restore it, then launch again")


def _overwritten_error(url: str, obj: Object) -> UserError:
    return UserError(
        f"{url}/{obj.name} was overwritten since the run began (it was generation {obj.generation}); "
        "restore it, or index the new data and begin another run with --name"
    )
