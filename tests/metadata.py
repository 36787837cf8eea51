"""The part of a Compute Engine VM's metadata server that programs on a TPU VM use.

`python -m tests.metadata FILE` serves the nested JSON object in FILE and reads it again at each request, so that
writing the file changes the metadata.
https://cloud.google.com/compute/docs/metadata/querying-metadata
"""

import hashlib
import json
import sys
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

ADDRESS = "169.254.169.254"
POLL_SECONDS = 0.05


class _Server(ThreadingTCPServer):
    """Not an HTTPServer, which looks up its own name and hangs without DNS."""

    daemon_threads = True
    allow_reuse_address = True


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    file: Path

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query))
        if self.headers.get("Metadata-Flavor") != "Google":
            self._send(403, "Missing Metadata-Flavor:Google header.")
            return
        text = self._found(url.path, query)
        if query.get("wait_for_change") == "true":
            known = query.get("last_etag", _etag(text or ""))
            until = time.monotonic() + float(query.get("timeout_sec", "inf"))
            while text is not None and _etag(text) == known and time.monotonic() < until:
                time.sleep(POLL_SECONDS)
                text = self._found(url.path, query)
        if text is None:
            self._send(404, f"{url.path} is not in the metadata")
        else:
            self._send(200, text)

    def _found(self, path: str, query: dict[str, str]) -> str | None:
        place: Any = {"computeMetadata": {"v1": json.loads(self.file.read_text())}}
        for name in filter(None, path.split("/")):
            if not isinstance(place, dict) or name not in place:
                return None
            place = place[name]
        if query.get("recursive") == "true" or query.get("alt") == "json":
            return json.dumps(place)
        if isinstance(place, dict):
            return "".join(f"{n}/\n" if isinstance(v, dict) else f"{n}\n" for n, v in place.items())
        return str(place)

    def _send(self, status: int, text: str) -> None:
        body = text.encode()
        kind = "json" if text.startswith(("{", "[", '"')) else "text"
        self.send_response(status)
        self.send_header("Content-Type", f"application/{kind}")
        self.send_header("Metadata-Flavor", "Google")
        self.send_header("ETag", _etag(text))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


def _etag(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def main() -> None:
    server = _Server((ADDRESS, 80), type("Handler", (_Handler,), {"file": Path(sys.argv[1])}))
    print(f"http://{ADDRESS}", flush=True)  # noqa: T201
    server.serve_forever()


if __name__ == "__main__":
    main()
