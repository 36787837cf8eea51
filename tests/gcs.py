"""Google Cloud Storage's JSON API on a loopback port, in memory, with faults on demand.

Implements the part of https://cloud.google.com/storage/docs/json_api that Google's client, gcsfs and TensorStore use,
with the conditions, ranges and generations of the real service. Tests use the fixture `gcs`;
`python -m tests.gcs --latency 0.03` serves other processes, which set faults by POST /faults.
"""

import argparse
import base64
import hashlib
import itertools
import json
import re
import socket
import struct
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

BUCKET = "bucket"
Operation = Literal["read", "get", "list", "upload", "copy", "patch", "delete", "bucket"]


@dataclass(frozen=True)
class Stored:
    """One generation of one object."""

    content: bytes
    meta: dict[str, Any]

    @property
    def generation(self) -> int:
        return int(self.meta["generation"])


@dataclass(frozen=True)
class Access:
    """One answered request."""

    operation: str
    object: str
    range: str | None
    generation: int | None
    """The generation that the request named."""
    status: int
    bytes: int


@dataclass
class Fault:
    """A fault: its kind, the requests that it affects, and how often."""

    kind: Literal["status", "reset", "short", "corrupt", "stall", "slow"]
    """`reset` (RST) and `short` (FIN) truncate the body at `at`; `corrupt` flips the byte there; `stall` pauses
    there for `seconds` or until `release()`; `slow` delays the first byte by `seconds`."""
    object: str = "*"
    """Pattern of object names, without the bucket."""
    operation: Operation | Literal["*"] = "read"
    start: tuple[int, int] | None = None
    """Only ranges whose first byte lies between these two, the second excluded."""
    status: int = 503
    at: float = 0.5
    """Place of the fault in the body, as a share of its length."""
    seconds: float = 60.0
    after: int = 0
    """Number of matching requests that succeed first."""
    count: int | None = None
    """Number of requests that are affected after those; None: all."""
    each: bool = False
    """Count `after` and `count` separately for each (operation, object, range)."""
    share: float = 1.0
    """Share of those requests that is affected, drawn from `seed` and the request, whatever the order of threads."""
    seed: int = 0
    _seen: dict[Any, int] = field(default_factory=lambda: defaultdict(int), repr=False)

    def hits(self, operation: str, name: str, span: str | None) -> bool:
        """Count this request, and return whether the fault affects it. Called with the server's lock held."""
        if self.operation not in ("*", operation) or not fnmatchcase(name, self.object):
            return False
        if self.start is not None:
            first = re.match(r"bytes=(\d+)", span or "bytes=0-")
            if first is None or not self.start[0] <= int(first[1]) < self.start[1]:
                return False
        key = (operation, name, span)
        self._seen[key] += 1
        self._seen[None] += 1
        n = self._seen[key if self.each else None] - self.after
        draw = zlib.crc32(repr((self.seed, key, self._seen[key])).encode()) / 2**32
        return n > 0 and (self.count is None or n <= self.count) and draw < self.share


@dataclass
class Reply:
    status: int
    body: bytes | memoryview = b""
    headers: dict[str, str] = field(default_factory=dict)


class Refused(Exception):  # noqa: N818
    """An answer other than success, with Google's form of error."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        error = {"code": status, "message": message, "errors": [{"message": message, "reason": str(status)}]}
        body = b"" if status == 304 else json.dumps({"error": error}).encode()  # a 304 has none
        self.reply = Reply(status, body, {"Content-Type": "application/json"})


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: Any
    body: bytes
    bucket: str = ""
    name: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


class Server:
    """A running server: its `address`, the objects, `faults` and `latency`, and a log of the requests."""

    def __init__(self, *buckets: str, host: str = "127.0.0.1", port: int = 0, latency: float = 0.0):
        self.latency = latency
        """Seconds to the first byte of every answer."""
        self.faults: list[Fault] = []
        self.denied: set[str] = set()
        """Permissions that the credentials lack."""
        self.log: list[Access] = []
        self.connections = 0
        self.max_concurrent = 0
        self.objects: dict[tuple[str, str], Stored] = {}
        self.lock = threading.RLock()
        self._buckets = set(buckets) or {BUCKET}
        self._uploads: dict[str, tuple[Request, bytearray]] = {}
        self._generations = itertools.count(1_700_000_000_000_000)
        self._concurrent = 0
        self._released = threading.Event()
        self._open: set[socket.socket] = set()
        self._http = _HttpServer((host, port), type("Handler", (_Handler,), {"server_": self}))
        self.address = f"http://{host}:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.release()
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._open):
            with suppress(OSError):  # the client was first
                connection.shutdown(socket.SHUT_RDWR)

    def put(self, name: str, content: bytes, bucket: str = BUCKET, **meta: Any) -> int:
        """Write an object, and return its generation."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        crc = base64.b64encode(google_crc32c.Checksum(content).digest()).decode()
        md5 = base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
        for key, computed in (("crc32c", crc), ("md5Hash", md5)):
            if meta.get(key, computed) != computed:
                raise Refused(400, f"Provided {key} {meta[key]} doesn't match calculated {computed}.")
        with self.lock:
            generation = str(next(self._generations))
            self.objects[bucket, name] = Stored(
                content,
                {
                    "contentType": "application/octet-stream", **meta,
                    "kind": "storage#object", "id": f"{bucket}/{name}/{generation}", "bucket": bucket, "name": name,
                    "generation": generation, "metageneration": "1", "size": str(len(content)), "etag": generation,
                    "crc32c": crc, "md5Hash": md5, "timeCreated": now, "updated": now, "storageClass": "STANDARD",
                },
            )  # fmt: skip
        return int(generation)

    def put_folder(self, folder: Path, prefix: str = "") -> None:
        """Write all files of a folder, under their paths."""
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            self.put(prefix + file.relative_to(folder).as_posix(), file.read_bytes())

    def contents(self, prefix: str = "", bucket: str = BUCKET) -> dict[str, bytes]:
        """Objects below a prefix by name, in order."""
        with self.lock:
            return {
                n: s.content
                for (b, n), s in sorted(self.objects.items())
                if b == bucket and n.startswith(prefix)
            }

    def release(self) -> None:
        """End all stalls and delays, present and future."""
        self._released.set()

    def reads(self, pattern: str = "*") -> list[Access]:
        """The logged requests for contents of objects."""
        return [a for a in list(self.log) if a.operation == "read" and fnmatchcase(a.object, pattern)]

    def counters(self) -> dict[str, int]:
        """Totals of the log."""
        return {
            "requests": len(self.log),
            "reads": len(self.reads()),
            "ranged_reads": sum(a.range is not None for a in self.reads()),
            "bytes_read": sum(a.bytes for a in self.reads()),
            "connections": self.connections,
            "max_concurrent": self.max_concurrent,
        }

    def forget(self) -> None:
        """Clear the log and its totals."""
        with self.lock:
            self.log.clear()
            self.connections = self.max_concurrent = 0

    # What an HTTP connection asks of it

    @contextmanager
    def connected(self, connection: socket.socket) -> Iterator[None]:
        with self.lock:
            self.connections += 1
            self._open.add(connection)
        try:
            yield
        finally:
            with self.lock:
                self._open.discard(connection)

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self.lock:
            self._concurrent += 1
            self.max_concurrent = max(self.max_concurrent, self._concurrent)
        try:
            yield
        finally:
            with self.lock:
                self._concurrent -= 1

    def answer(self, request: Request) -> tuple[Operation, Fault | None, Reply]:
        """Route and carry out a request, unless a fault affects it."""
        operation, handle = self._route(request)
        span = request.headers.get("Range")
        with self.lock:
            fault = next((f for f in self.faults if f.hits(operation, request.name, span)), None)
        if fault and fault.kind == "slow":
            self.pause(fault.seconds)
        if fault and fault.kind == "status":
            message = "Invalid Credentials" if fault.status == 401 else f"injected {fault.status}"
            return operation, fault, Refused(fault.status, message).reply
        try:
            with self.lock:
                return operation, fault, handle(self, request)
        except Refused as refused:
            return operation, fault, refused.reply

    def pause(self, seconds: float) -> None:
        self._released.wait(seconds)

    def control(self, request: Request) -> Reply:
        """POST /faults {latency, rules} replaces them, POST /release ends stalls, GET /counters, GET /log."""
        if request.path == "/faults":
            wanted = json.loads(request.body)
            self.latency = wanted.get("latency", self.latency)
            self.faults = [Fault(**rule) for rule in wanted.get("rules", [])]
        elif request.path == "/release":
            self.release()
        elif request.path == "/log":
            return _json([asdict(a) for a in list(self.log)])
        return _json(self.counters())

    def _route(self, request: Request) -> tuple[Operation, Callable[["Server", Request], Reply]]:
        """The operation, its object, and the method that carries it out."""
        for method, pattern, operation, handle in _ROUTES:
            found = re.fullmatch(pattern, request.path)
            if found and request.method == method:
                request.bucket, request.name = (*map(unquote, found.groups()), "", "")[:2]
                if request.bucket and request.bucket not in self._buckets:
                    return operation, _no_bucket
                if operation == "upload":
                    _unpack(request)
                if request.query.get("alt") == "media" and method == "GET":
                    return "read", Server._read
                return operation, handle
        return "bucket", _no_route

    # Operations

    def _create_bucket(self, request: Request) -> Reply:
        name = json.loads(request.body)["name"]
        if name in self._buckets:
            raise Refused(409, f"bucket {name} exists")
        self._buckets.add(name)
        return _json({"kind": "storage#bucket", "name": name, "id": name})

    def _get_bucket(self, request: Request) -> Reply:
        return _json({"kind": "storage#bucket", "name": request.bucket, "id": request.bucket})

    def _permissions(self, request: Request) -> Reply:
        granted = set(request.query["permissions"].split(",")) - self.denied
        return _json({"permissions": sorted(granted)})

    def _list(self, request: Request) -> Reply:
        q = request.query
        prefix, delimiter, token = q.get("prefix", ""), q.get("delimiter", ""), q.get("pageToken", "")
        first, limit = q.get("startOffset", ""), int(q.get("maxResults", 1000))
        items: list[dict[str, Any]] = []
        prefixes: list[str] = []
        last = ""
        for (bucket, name), stored in sorted(self.objects.items()):
            folder = name[: name.find(delimiter, len(prefix)) + 1] if delimiter else ""
            place = folder or name
            if (
                bucket != request.bucket or not name.startswith(prefix) or name < first
                or place <= token or ("endOffset" in q and name >= q["endOffset"]) or place in prefixes[-1:]
            ):  # fmt: skip
                continue
            if len(items) + len(prefixes) == limit:
                return _json({"items": items, "prefixes": prefixes, "nextPageToken": last})
            last = place
            prefixes.append(folder) if folder else items.append(stored.meta)
        return _json({"kind": "storage#objects", "items": items, "prefixes": prefixes})

    def _get(self, request: Request) -> Reply:
        return _json(self._found(request).meta)

    def _read(self, request: Request) -> Reply:
        stored = self._found(request)
        headers = {
            "Content-Type": stored.meta["contentType"],
            "Accept-Ranges": "bytes",
            "x-goog-generation": stored.meta["generation"],
            "x-goog-metageneration": stored.meta["metageneration"],
            "x-goog-stored-content-length": stored.meta["size"],
            "x-goog-hash": f"crc32c={stored.meta['crc32c']},md5={stored.meta['md5Hash']}",
        }
        size = len(stored.content)
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
        if span is None or span.groups() == ("", ""):
            return Reply(200, memoryview(stored.content), headers)
        first, last = span.groups()
        begin = int(first) if first else max(size - int(last), 0)
        end = min(int(last) + 1, size) if first and last else size
        if begin >= end:
            return Reply(416, b"", {"Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
        return Reply(206, memoryview(stored.content)[begin:end], headers)

    def _patch(self, request: Request) -> Reply:
        meta = self._found(request).meta
        meta |= json.loads(request.body) | {"metageneration": str(int(meta["metageneration"]) + 1)}
        return _json(meta)

    def _delete(self, request: Request) -> Reply:
        self._found(request)
        del self.objects[request.bucket, request.name]
        return Reply(204)

    def _copy(self, request: Request) -> Reply:
        """copyTo and rewriteTo another bucket or this one; moveTo within this one."""
        source = self._found(request)
        how, bucket, name = re.findall(r"/(copy|rewrite|move)To(?:/b/([^/]+))?/o/([^/]+)$", request.path)[0]
        bucket, name = unquote(bucket) or request.bucket, unquote(name)
        self.put(name, source.content, bucket)
        if how == "move":
            del self.objects[request.bucket, request.name]
        meta = self.objects[bucket, name].meta
        size = meta["size"]
        done = {"done": True, "totalBytesRewritten": size, "objectSize": size, "resource": meta}
        return _json(done if how == "rewrite" else meta)

    def _compose(self, request: Request) -> Reply:
        wanted = json.loads(request.body)
        sources = (self.objects.get((request.bucket, part["name"])) for part in wanted["sourceObjects"])
        parts = [source.content if source else None for source in sources]
        if None in parts:
            raise Refused(404, "No such object")
        request.body, request.meta = b"".join(filter(None, parts)), wanted.get("destination", {})
        return self._write(request)

    def _upload(self, request: Request) -> Reply:
        if request.query.get("uploadType") != "resumable":
            return self._write(request)
        upload = request.query.get("upload_id", "")
        if not upload:
            upload = str(len(self._uploads) + 1)
            self._uploads[upload] = request, bytearray()
            path = f"/upload/storage/v1/b/{request.bucket}/o?uploadType=resumable&upload_id={upload}"
            return Reply(200, b"", {"Location": self.address + path})
        if upload not in self._uploads:
            raise Refused(404, f"no upload {upload}")
        begun, content = self._uploads[upload]
        span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", request.headers.get("Content-Range", ""))
        begin, total = span.groups() if span else ("0", str(len(request.body)))
        if begin is not None:
            content[int(begin) :] = request.body
        if total != str(len(content)):
            return Reply(308, b"", {"Range": f"bytes=0-{len(content) - 1}"} if content else {})
        begun.body = bytes(content)
        return self._write(begun)

    def _write(self, request: Request) -> Reply:
        self._check(request, self.objects.get((request.bucket, request.name)))
        known = ("contentType", "crc32c", "md5Hash", "metadata")
        kept = {key: value for key, value in request.meta.items() if key in known}
        self.put(request.name, request.body, request.bucket, **kept)
        return _json(self.objects[request.bucket, request.name].meta)

    def _found(self, request: Request) -> Stored:
        """The object in the generation, and under the conditions, of the request."""
        stored = self.objects.get((request.bucket, request.name))
        if stored is not None:
            self._check(request, stored)
        wanted = request.query.get("generation")
        if stored is None or wanted not in (None, stored.meta["generation"]):
            raise Refused(404, f"No such object: {request.bucket}/{request.name}")
        return stored

    def _check(self, request: Request, stored: Stored | None) -> None:
        now = stored.generation if stored else 0
        q = request.query
        if "ifGenerationMatch" in q and int(q["ifGenerationMatch"]) != now:
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")
        if "ifGenerationNotMatch" in q and int(q["ifGenerationNotMatch"]) == now:
            raise Refused(304 if request.method == "GET" else 412, "not modified")


_B, _O = r"(?:/download)?/storage/v1/b/([^/]+)", r"/o/([^/]+)"
_ROUTES: list[tuple[str, str, Operation, Callable[[Server, Request], Reply]]] = [
    ("POST", r"/storage/v1/b", "bucket", Server._create_bucket),
    ("GET", _B, "bucket", Server._get_bucket),
    ("GET", _B + "/iam/testPermissions", "bucket", Server._permissions),
    ("GET", _B + "/o", "list", Server._list),
    ("GET", _B + _O, "get", Server._get),
    ("POST", "/upload" + _B + "/o", "upload", Server._upload),
    ("PUT", "/upload" + _B + "/o", "upload", Server._upload),
    ("POST", _B + _O + r"/(?:copy|rewrite|move)To(?:/b/[^/]+)?/o/[^/]+", "copy", Server._copy),
    ("POST", _B + _O + "/compose", "copy", Server._compose),
    ("PATCH", _B + _O, "patch", Server._patch),
    ("DELETE", _B + _O, "delete", Server._delete),
]


def _unpack(request: Request) -> None:
    """Take name, metadata and content out of an upload's body (multipart/related: RFC 2387)."""
    kind = request.query.get("uploadType")
    if kind == "multipart":
        boundary = re.search(r'boundary="?([^";]+)', request.headers["Content-Type"])
        assert boundary is not None
        mark = b"--" + boundary[1].encode()
        _, meta, rest = request.body.split(mark, 2)
        parts = (meta, rest.rpartition(mark)[0])
        (_, described), (_, data) = (re.split(rb"\r?\n\r?\n", part, maxsplit=1) for part in parts)
        request.meta, request.body = json.loads(described), data[: -2 if data.endswith(b"\r\n") else -1]
    elif kind == "resumable" and "upload_id" not in request.query:
        request.meta = json.loads(request.body or b"{}")
    request.name = request.query.get("name") or request.meta.get("name", "")


def _json(value: Any) -> Reply:
    return Reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


def _no_bucket(server: Server, request: Request) -> Reply:
    raise Refused(404, "The specified bucket does not exist.")


def _no_route(server: Server, request: Request) -> Reply:
    raise Refused(404, f"{request.method} {request.path} is not of this API")


def _abort(connection: socket.socket) -> None:
    """End a connection by RST."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def environment(address: str) -> dict[str, str]:
    """Environment with which the clients use only the server at `address`."""
    return {
        "STORAGE_EMULATOR_HOST": address,  # Google's client, gcsfs
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # its probe of the bucket's type speaks gRPC
        "GOOGLE_CLOUD_PROJECT": "test",
        "GCE_METADATA_ROOT": "127.0.0.1:9",  # nobody: no minute's search for credentials
        "GCE_METADATA_HOST": "127.0.0.1:9",
        "NO_GCE_CHECK": "true",
    }


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    server_bind = TCPServer.server_bind  # HTTPServer's looks the host's name up, which can take long
    request_queue_size = 256  # a burst of connections is not to wait for repeated SYNs


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_: Server

    def handle(self) -> None:
        with self.server_.connected(self.connection):
            try:
                super().handle()
            except ConnectionError:
                self.close_connection = True  # the client has gone

    def _serve(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        query = {name: ",".join(values) for name, values in parse_qs(url.query, True).items()}
        request = Request(self.command, url.path, query, self.headers, body)
        if not url.path.startswith(("/storage/", "/upload/", "/download/")):
            self._send(self.server_.control(request))
            return
        with self.server_.counted():
            if self.server_.latency:
                time.sleep(self.server_.latency)
            operation, fault, reply = self.server_.answer(request)
            generation = request.query.get("generation")
            self.server_.log.append(
                Access(
                    operation, request.name, self.headers.get("Range"), int(generation) if generation else None,
                    reply.status, len(reply.body),
                )
            )  # fmt: skip
            self._send(reply, fault if reply.status < 300 else None)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815

    def _send(self, reply: Reply, fault: Fault | None = None) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        body = memoryview(reply.body)
        if fault and len(body):
            at = min(int(len(body) * fault.at), len(body) - 1)
            body = self._spoil(fault, body, at)
        self.wfile.write(body)

    def _spoil(self, fault: Fault, body: memoryview, at: int) -> memoryview:
        """Apply a fault to a body at its place; returns the rest that is still to be sent."""
        if fault.kind == "corrupt":
            return memoryview(bytes(body[:at]) + bytes([body[at] ^ 1]) + bytes(body[at + 1 :]))
        if fault.kind in ("status", "slow"):
            return body
        self.wfile.write(body[:at])
        if fault.kind == "stall":
            self.server_.pause(fault.seconds)
            return body[at:]
        self.close_connection = True
        if fault.kind == "reset":
            self.rfile.close()  # a file holds the descriptor open
            _abort(self.connection)
            raise ConnectionAbortedError
        return body[:0]

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds to the first byte")
    parser.add_argument("--folder", type=Path, help="files to begin with")
    parser.add_argument("--bucket", default=BUCKET)
    arguments = parser.parse_args()
    server = Server(arguments.bucket, port=arguments.port, latency=arguments.latency)
    if arguments.folder:
        server.put_folder(arguments.folder)
    print(server.address, flush=True)  # noqa: T201
    threading.Event().wait()


if __name__ == "__main__":
    main()
