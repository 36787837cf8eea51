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
# A lease that is not renewed for so long, by the clock of the launcher that waits for it, is void. In that time its
# holder tries six times to renew it.
LEASE_SECONDS = 30.0
RENEW_SECONDS = 5.0
POLL_SECONDS = 1.0
# The clocks of launchers and of the service are assumed to agree within this.
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
        # A thread of its own: the lease must be renewed also while the launcher waits for a host or for the user.
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)
        self.is_lost = False

    def take(self) -> None:
        """Raises HeldError where another launcher renews the lease.

        Clocks may differ, so a lease that looks void is watched for LEASE_SECONDS before it is taken over.
        """
        watched, deadline = 0, 0.0
        while not self._put():
            blob = self._get()
            if blob is None:  # the holder has released the lease meanwhile
                self._generation = 0
                continue
            if not watched:
                watched, deadline = blob.generation, time.monotonic() + LEASE_SECONDS
            if blob.generation != watched:
                text = self._read(blob)
                if text is None:  # renewed once more meanwhile
                    continue
                holder = json.loads(text)
                raise HeldError(f"process {holder['pid']} on {holder['host']}")
            age = time.time() - blob.updated.timestamp()
            if age > LEASE_SECONDS + CLOCK_SECONDS or time.monotonic() > deadline:
                self._generation = watched  # so that the next `_put` replaces the lease
            else:
                time.sleep(POLL_SECONDS)
        self._renewing.start()

    def release(self) -> None:
        self._released.set()
        self._renewing.join()
        if not self.is_lost:
            with suppress(*google.errors()):  # a lease that is not renewed ends by itself
                ours = self._generation  # the lease may have been taken over since the last renewal
                self._bucket.delete_blob(self._name, if_generation_match=ours, retry=google.retry())

    def _renew(self) -> None:
        while not self._released.wait(RENEW_SECONDS):
            # Where the bucket is out of reach, no other launcher can have taken the lease either.
            with suppress(*google.errors()):
                self.renew()
                if self.is_lost:
                    return

    def renew(self) -> None:
        """Renew the lease, or find that it is lost.

        Also called before a step that only the holder may take: this machine may have slept since the last renewal.
        """
        with self._lock:
            self.is_lost = self.is_lost or not self._put()

    def _put(self) -> bool:
        """Write the lease, if its generation is still the one that we know, 0 for none; whether it was written."""
        from google.api_core.exceptions import PreconditionFailed

        blob = self._bucket.blob(self._name)
        try:
            expected = self._generation
            blob.upload_from_string(self._text, if_generation_match=expected, retry=google.retry())
        except PreconditionFailed:
            blob = self._get()
            # Our own text is there where the service did our last request, but its answer was lost.
            if blob is None or self._read(blob) != self._text:
                return False
        self._generation = blob.generation
        return True

    def _get(self) -> Any:
        """The lease as it is now, or None. Not `reload`: a blob that was read is bound to its generation."""
        return self._bucket.get_blob(self._name, retry=google.retry())

    def _read(self, blob: Any) -> str | None:
        """The content of that generation; None where it has been replaced meanwhile."""
        from google.api_core.exceptions import NotFound

        with suppress(NotFound):
            return str(blob.download_as_text(retry=google.retry()))
        return None


def is_held(bucket: Any, name: str) -> bool:
    """Whether some launcher holds the lease, by the clocks of this machine and of the service."""
    blob = bucket.get_blob(name, retry=google.retry())
    return blob is not None and time.time() - blob.updated.timestamp() < LEASE_SECONDS
