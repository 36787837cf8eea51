"""Event files to gs://: written to a local folder, uploaded by a thread in bounded pieces.

An object cannot be appended to, and tensorboardX's own gs:// writer sends the whole file again at each
flush. Here a file goes up as numbered objects: the newest is sent again as it grows until it holds
PIECE_BYTES, then the next begins. TensorBoard reads the event files of a folder one after another, in
the order of their names, so the pieces show as one run.
"""

import logging
import struct
import tempfile
import threading
from pathlib import Path

from google.api_core.exceptions import GoogleAPIError
from google.auth.exceptions import GoogleAuthError

from configs import google

PIECE_BYTES = 4 << 20
INTERVAL_SECONDS = 15.0
_log = logging.getLogger(__name__)


class Uploader:
    """Mirrors the event files of `folder` to `destination` (gs://bucket/prefix) until closed."""

    def __init__(
        self,
        destination: str,
        *,
        piece_bytes: int = PIECE_BYTES,
        interval_seconds: float = INTERVAL_SECONDS,
    ):
        where = f"log.tensorboard = {destination}"
        bucket, self._prefix = google.bucket_and_prefix(destination)
        with google.explained(where, bucket=bucket, roles="the role Storage Object User on the bucket"):
            self._bucket = google.client().bucket(bucket)
        self._piece_bytes = piece_bytes
        self._interval = interval_seconds
        self._local = tempfile.TemporaryDirectory(prefix="podlaunch-tensorboard-")
        self.folder = Path(self._local.name)
        self._sent: dict[Path, _Sent] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tensorboard upload", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send what is left, then remove the local copy."""
        self._closing.set()
        self._thread.join()
        self._send_logged()
        self._local.cleanup()

    def _run(self) -> None:
        while not self._closing.wait(self._interval):
            self._send_logged()

    def _send_logged(self) -> None:
        # A bucket that cannot be reached costs the picture, not the training; the next round tries again.
        try:
            self.send()
        except (GoogleAPIError, GoogleAuthError, OSError) as e:
            _log.warning("TensorBoard events not uploaded to gs://%s: %s", self._bucket.name, e)

    def send(self) -> None:
        """Upload the records written since the last call."""
        for file in sorted(self.folder.iterdir()):
            sent = self._sent.setdefault(file, _Sent())
            while self._send_piece(file, sent):
                pass

    def _send_piece(self, file: Path, sent: "_Sent") -> bool:
        """Send the newest piece if it has grown. True if it is full, and the next may be due."""
        with file.open("rb") as f:
            f.seek(sent.piece_start)
            content = f.read()
        end = whole_records(content, self._piece_bytes)
        if sent.piece_start + end > sent.upto:
            self._bucket.blob(f"{self._prefix}{file.name}.{sent.piece:05d}").upload_from_string(
                content[:end], "application/octet-stream", timeout=60, checksum="crc32c"
            )
            sent.upto = sent.piece_start + end
        full = end >= self._piece_bytes or end < whole_records(content, len(content))
        if full:
            sent.piece, sent.piece_start = sent.piece + 1, sent.upto
        return full


def whole_records(content: bytes, limit: int) -> int:
    """Bytes of the leading whole TFRecords (length u64, crc u32, data, crc u32) within `limit`, at least one."""
    end = 0
    while end + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, end)
        after = end + 12 + length + 4
        if after > len(content) or (end and after > limit):
            break
        end = after
    return end


class _Sent:
    """How far one file has been uploaded."""

    piece = 0
    piece_start = 0
    upto = 0
