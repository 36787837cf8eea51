"""Cloud Storage as launcher/ and trainer/ both meet it: an address, and Google's errors in one line for the user.

Google's packages are imported where they are used: they take 0.3 s, and most commands do without.
"""

import base64
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from configs.errors import UserError

READ_SECONDS = 10.0
RETRY_SECONDS = 30.0
"""For listing and small objects; what is streamed has its own rules."""
LOG_IN = "`gcloud auth application-default login`"


class UnreachableError(Exception):
    """The service does not answer, or not as it should. Later it may."""


def bucket_and_prefix(url: str) -> tuple[str, str]:
    """`gs://bucket/a/b` as ("bucket", "a/b/"). Raises UserError where it names no bucket."""
    bucket, _, prefix = url.removeprefix("gs://").partition("/")
    if not bucket:
        raise UserError(f"{url}: names no bucket; give gs://bucket/prefix")
    prefix = prefix.strip("/")
    return bucket, f"{prefix}/" if prefix else ""


def retry(seconds: float | None = None) -> Any:
    """The client's own repetitions: RETRY_SECONDS instead of its two minutes, unless told."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(seconds or RETRY_SECONDS).with_delay(initial=0.1, maximum=4.0)


def client() -> Any:
    """Google's client, which needs no project for what is done here."""
    from google.cloud import storage

    return storage.Client(project=None)


@contextmanager
def explained(where: str, *, bucket: str, roles: str) -> Iterator[None]:
    """Raises UserError for what the user must mend, and UnreachableError; `roles` are those that are needed."""
    from google.api_core.exceptions import GoogleAPICallError, NotFound, RetryError
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
    from requests.exceptions import RequestException

    try:
        yield
    except DefaultCredentialsError as e:
        detail = f" ({first_line(e)})" if os.environ.get("GOOGLE_APPLICATION_CREDENTIALS") else ""
        raise UserError(
            f"{where}: there are no Google credentials{detail}; log in with {LOG_IN}, "
            "or set GOOGLE_APPLICATION_CREDENTIALS to the file of a service account"
        ) from None
    except NotFound:
        raise UserError(
            f"{where}: there is no bucket {bucket}; make it with `gcloud storage buckets create gs://{bucket}`, "
            "or name another"
        ) from None
    except (GoogleAPICallError, RetryError, RequestException, TransportError) as e:
        code = getattr(e, "code", None)
        if code in (401, 403):
            raise UserError(denied(where, code, roles)) from None
        cause = getattr(e, "cause", None) or e  # of the client's repetitions
        raise UnreachableError(f"{where} cannot be reached: {first_line(cause)}") from None
    except GoogleAuthError as e:
        if is_passing(e):
            raise UnreachableError(f"{where}: no credentials now: {first_line(e)}") from None
        raise UserError(refused(where, e)) from None


def errors() -> tuple[type[Exception], ...]:
    """All that the client raises of a service that refuses or cannot be reached."""
    from google.api_core.exceptions import GoogleAPICallError, RetryError
    from google.auth.exceptions import GoogleAuthError
    from requests.exceptions import RequestException

    return (GoogleAPICallError, RetryError, GoogleAuthError, RequestException)


def is_passing(error: Any) -> bool:
    """Whether credentials were only out of reach. google-auth says so, or wraps what it met, in several ways."""
    from google.auth.exceptions import TransportError

    return error.retryable or any(
        isinstance(e, TransportError) for e in (error, error.__cause__, *error.args)
    )


def crc32c(blob: Any) -> int:
    """The Castagnoli CRC (RFC 3720, appendix B.4) of a whole object, as the service keeps it."""
    return int.from_bytes(base64.b64decode(blob.crc32c), "big")


def denied(where: str, status: int, roles: str) -> str:
    return (
        f"{where}: these credentials have no permission (HTTP {status}); give them {roles}, "
        f"or log in with others: {LOG_IN}"
    )


def refused(where: str, error: Exception) -> str:
    return f"{where}: the Google credentials were refused ({first_line(error)}); renew them, as with {LOG_IN}"


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
