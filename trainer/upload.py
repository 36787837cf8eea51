"""TensorBoard's event files to gs://: written to a local folder, uploaded by a thread in bounded pieces.

An object cannot be appended to, and tensorboardX's own gs:// writer sends the whole file again at each flush.
Here a file goes up as numbered objects: the newest is sent again as it grows until it holds PIECE_BYTES, then
the next begins. TensorBoard reads the event files of a folder in the order of their names, so the pieces show
as one run.
"""

import contextlib
import logging
import struct
import threading
from pathlib import Path

from google.api_core.exceptions import GoogleAPIError
from google.auth.exceptions import GoogleAuthError

from configs import google
from configs.files import temporary_folder

PIECE_BYTES = 4 << 20
INTERVAL_SECONDS = 15.0
_log = logging.getLogger(__name__)


class Uploader:
    """Mirrors the event files of `folder` to `destination` (gs://bucket/prefix) until it is closed.

    Raises UserError if the address names no bucket or there are no Google credentials.
    """

    def __init__(
        self, destination: str, *, piece_bytes: int = PIECE_BYTES, interval_seconds: float = INTERVAL_SECONDS
    ):
        setting = f"log.tensorboard = {destination}"
        bucket, self._prefix = google.bucket_and_prefix(destination)
        with google.explained(setting, bucket=bucket, roles="the role Storage Object User on the bucket"):
            self._bucket = google.client().bucket(bucket)
        self._piece_bytes = piece_bytes
        self._interval = interval_seconds
        self._local = contextlib.ExitStack()
        self.folder = self._local.enter_context(temporary_folder("tensorboard"))
        self._states: dict[Path, _UploadState] = {}
        self._closing = threading.Event()
        # A daemon thread, because a training that fails must be able to exit.
        self._thread = threading.Thread(target=self._run, name="tensorboard upload", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Upload the last records, then remove the local folder."""
        self._closing.set()
        # The thread may just have uploaded something; the call after this one sends what was written since.
        self._thread.join()
        self._try_send()
        self._local.close()

    def _run(self) -> None:
        while not self._closing.wait(self._interval):
            self._try_send()

    def _try_send(self) -> None:
        # Training goes on while a bucket cannot be reached. The next round sends the same records again.
        try:
            self.send()
        except (GoogleAPIError, GoogleAuthError, OSError) as e:
            _log.warning("TensorBoard events not uploaded to gs://%s: %s", self._bucket.name, e)

    def send(self) -> None:
        """Upload the records that were written since the last call. Raises the errors of Google's client."""
        for file in sorted(self.folder.iterdir()):
            state = self._states.setdefault(file, _UploadState())
            while self._send_piece(file, state):
                pass

    def _send_piece(self, file: Path, state: "_UploadState") -> bool:
        """Send the newest piece of a file if it has grown. Returns whether it is full."""
        with file.open("rb") as f:
            f.seek(state.piece_start)
            content = f.read()
        end = whole_records(content, self._piece_bytes)
        if state.piece_start + end > state.uploaded_bytes:
            self._bucket.blob(f"{self._prefix}{file.name}.{state.piece:05d}").upload_from_string(
                content[:end], "application/octet-stream", timeout=60, checksum="crc32c"
            )
            state.uploaded_bytes = state.piece_start + end
        # A piece is also full when the next whole record would not fit into it.
        full = end >= self._piece_bytes or end < whole_records(content, len(content))
        if full:
            state.piece, state.piece_start = state.piece + 1, state.uploaded_bytes
        return full


def whole_records(content: bytes, limit: int) -> int:
    """Bytes of the complete TFRecords at the start of `content`: up to `limit`, but at least one record.

    A record is a length (uint64), a crc (uint32), the data, and a crc of the data (uint32).
    """
    end = 0
    while end + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, end)
        after = end + 12 + length + 4
        if after > len(content) or (end and after > limit):
            break
        end = after
    return end


class _UploadState:
    """How much of one file has been uploaded."""

    piece = 0
    """Number of the newest piece."""
    piece_start = 0
    """Where the newest piece begins, in bytes of the file."""
    uploaded_bytes = 0
