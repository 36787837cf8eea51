"""Cloud Storage for launcher/ and trainer/: gs:// addresses, the client, and Google's errors in one line.

Functions import Google's packages themselves: the import takes 0.3 s, and most commands do not need it.
"""

import base64
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from configs.errors import UserError

READ_SECONDS = 10.0
"""Seconds without an answer, or without a further byte, after which a request fails."""
RETRY_SECONDS = 30.0
"""Seconds to retry requests for listings and small objects. Streamed images have limits of their own."""
LOG_IN = "`gcloud auth application-default login`"


class UnreachableError(Exception):
    """The service does not answer, or answers with an error of its own. A later attempt may succeed."""


class NoAccessError(UserError):
    """There are no credentials, or not ones that may do this. Those of another machine may."""


def normalised(url: str) -> str:
    """`gs://bucket/a/b`, written in one way only, since the id of a run is a digest of its location.

    Raises ValueError where `url` is no such address.
    """
    bucket, *folders = filter(None, url.removeprefix("gs://").split("/"))
    if not url.startswith("gs://") or url.startswith("gs:///"):
        raise ValueError("must be gs://bucket/prefix")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", bucket):
        raise ValueError(f"{bucket} is not a valid bucket name; give gs://bucket/prefix")
    return "/".join([f"gs://{bucket}", *folders])


def bucket_and_prefix(url: str) -> tuple[str, str]:
    """`gs://bucket/a/b` as ("bucket", "a/b/"). Raises UserError if the address names no bucket."""
    bucket, _, prefix = url.removeprefix("gs://").partition("/")
    if not bucket:
        raise UserError(f"{url}: names no bucket; give gs://bucket/prefix")
    prefix = prefix.strip("/")
    return bucket, f"{prefix}/" if prefix else ""


def retry(seconds: float | None = None) -> Any:
    """The client's retry policy, limited to `seconds`, by default RETRY_SECONDS instead of its own two minutes."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(seconds or RETRY_SECONDS).with_delay(initial=0.1, maximum=4.0)


def client() -> Any:
    """Google's client. Raises google.auth.exceptions.DefaultCredentialsError where there are no credentials."""
    from google.cloud import storage

    # Only creating and listing buckets needs a project, but by default the client refuses to start without one.
    return storage.Client(project=None)


@contextmanager
def explained(where: str, *, bucket: str, roles: str) -> Iterator[None]:
    """Turn Google's errors into UserError where the user must fix something, and into UnreachableError otherwise.

    `where` begins the message, and `roles` are those that the credentials need on `bucket`.
    """
    from google.api_core.exceptions import GoogleAPICallError, NotFound, RetryError
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
    from requests.exceptions import RequestException

    try:
        yield
    except DefaultCredentialsError as e:
        detail = f" ({first_line(e)})" if os.environ.get("GOOGLE_APPLICATION_CREDENTIALS") else ""
        raise NoAccessError(
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
            raise NoAccessError(denied(where, code, roles)) from None
        # After the last retry, the client wraps the error of the service, which is the one that explains.
        cause = getattr(e, "cause", None) or e
        raise UnreachableError(f"{where} cannot be reached: {first_line(cause)}") from None
    except GoogleAuthError as e:
        if is_passing(e):
            raise UnreachableError(f"{where}: no credentials now: {first_line(e)}") from None
        raise NoAccessError(refused(where, e)) from None


def errors() -> tuple[type[Exception], ...]:
    """All exceptions that the client raises when the service refuses a request or cannot be reached."""
    from google.api_core.exceptions import GoogleAPICallError, RetryError
    from google.auth.exceptions import GoogleAuthError
    from requests.exceptions import RequestException

    return (GoogleAPICallError, RetryError, GoogleAuthError, RequestException)


def is_passing(error: Any) -> bool:
    """Whether a GoogleAuthError is temporary, such as an unreachable token server."""
    from google.auth.exceptions import TransportError

    # google-auth marks such an error, chains it, or passes it as an argument, depending on the kind of credentials.
    return error.retryable or any(
        isinstance(e, TransportError) for e in (error, error.__cause__, *error.args)
    )


def crc32c(blob: Any) -> int:
    """The CRC-32C (RFC 3720, appendix B.4) of a whole object, which the service stores with it in base64."""
    return int.from_bytes(base64.b64decode(blob.crc32c), "big")


def denied(where: str, status: int, roles: str) -> str:
    """Message for credentials without permission; `status` is the HTTP status."""
    return (
        f"{where}: these credentials have no permission (HTTP {status}); give them {roles}, "
        f"or log in with others: {LOG_IN}"
    )


def refused(where: str, error: Exception) -> str:
    """Message for credentials that Google refuses, such as expired ones."""
    return f"{where}: the Google credentials were refused ({first_line(error)}); renew them, for example with {LOG_IN}"


def first_line(error: BaseException) -> str:
    """First line of the error's text, or the name of its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
