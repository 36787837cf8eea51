"""The lease by which one launcher at a time holds a run under gs://.

The lease is an object that its holder renews, each time on the condition that nobody has replaced it meanwhile
(https://cloud.google.com/storage/docs/request-preconditions). Others take it over when it is not renewed.
"""

import json
import os
import threading
import time
from contextlib import suppress
from socket import gethostname
from typing import Any
from uuid import uuid4

from configs import google

LEASE = "lease.json"
RENEW_SECONDS = 5.0
# A lease that is not renewed for so long, by the clock of the launcher that waits for it, is void.
LEASE_SECONDS = 30.0
POLL_SECONDS = 1.0
# Clocks of launchers and of the service are trusted to agree within this.
CLOCK_SECONDS = 90.0


class HeldError(Exception):
    """Another launcher holds the run; the message names its process, if that is known."""


class Lease:
    def __init__(self, bucket: Any, name: str):
        self._bucket, self._name = bucket, name
        self._generation = 0
        self._text = json.dumps({"host": gethostname(), "pid": os.getpid(), "id": uuid4().hex})
        self._released = threading.Event()
        self._lock = threading.Lock()
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)
        self.is_lost = False

    def take(self) -> None:
        """Raises HeldError where another launcher renews the lease.

        Clocks may differ, so a lease that looks void is watched for LEASE_SECONDS before it is taken over.
        """
        watched, deadline = 0, 0.0
        while not self._put():
            found = self._look()
            if found is None:  # the holder has given it back meanwhile
                self._generation = 0
                continue
            if not watched:
                watched, deadline = found.generation, time.monotonic() + LEASE_SECONDS
            if found.generation != watched:
                holder = json.loads(self._read(found) or "{}")
                raise HeldError(f"process {holder['pid']} on {holder['host']}" if holder else "")
            age = time.time() - found.updated.timestamp()
            if age > LEASE_SECONDS + CLOCK_SECONDS or time.monotonic() > deadline:
                self._generation = watched
            else:
                time.sleep(POLL_SECONDS)
        self._renewing.start()

    def release(self) -> None:
        self._released.set()
        self._renewing.join()
        if not self.is_lost:
            with suppress(*google.errors()):  # a lease that is not renewed ends by itself
                self._bucket.delete_blob(
                    self._name, if_generation_match=self._generation, retry=google.retry()
                )

    def _renew(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            # Where the bucket is out of reach, no other launcher can have taken the lease either.
            with suppress(*google.errors()):
                self.renew()
                if self.is_lost:
                    return

    def renew(self) -> None:
        """Renew it, or find that it is lost. Also called before a step that only the holder may take: this machine
        may have slept since the last renewal.
        """
        with self._lock:
            self.is_lost = self.is_lost or not self._put()

    def _put(self) -> bool:
        """Write the lease, unless it has another generation than our last (0: there was none); whether it was written."""
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
            blob = found  # our own: a request was done whose answer was lost
        self._generation = blob.generation
        return True

    def _look(self) -> Any:
        """The lease as it is now, or None. Not `reload`: a blob that was read is bound to its generation."""
        return self._bucket.get_blob(self._name, retry=google.retry())

    def _read(self, found: Any) -> str | None:
        """The content of that generation; None where it has been replaced meanwhile."""
        from google.api_core.exceptions import NotFound

        with suppress(NotFound):
            return str(found.download_as_text(retry=google.retry()))
        return None


def is_held(bucket: Any, name: str) -> bool:
    """Whether some launcher holds the lease, by the clocks of this machine and of the service."""
    blob = bucket.get_blob(name, retry=google.retry())
    return blob is not None and time.time() - blob.updated.timestamp() < LEASE_SECONDS
