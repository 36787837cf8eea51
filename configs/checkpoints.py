"""The place of a run's checkpoints, a folder or a gs:// prefix: which are complete, and which run owns them.

In configs/ because launcher/ and trainer/ both need it, and the launcher may not import jax and Orbax.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs import google
from configs.errors import UserError

COMMITTED = "commit_success.txt"
"""Object that Orbax writes last into a checkpoint under gs://, where a folder cannot be renamed."""
OWNER = "run.json"
"""File that names the run to which the checkpoints belong."""
PERMISSIONS = (
    "storage.objects.list", "storage.objects.get", "storage.objects.create", "storage.objects.delete",
    "storage.buckets.get",  # to delete an old checkpoint, Orbax first reads the type of the bucket
)  # fmt: skip
ROLES = "the roles Storage Object User and Storage Legacy Bucket Reader on the bucket"


def steps(place: str) -> list[int]:
    """Steps of the complete checkpoints, oldest first; none if the folder or prefix does not exist.

    Raises UserError if the place cannot be read.
    """
    if not place.startswith("gs://"):
        # On a disk, Orbax renames a folder to its step only when the checkpoint is complete.
        folder = Path(place)
        return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit()) if folder.is_dir() else []
    with _bucket(place) as (bucket, prefix):
        listing = bucket.list_blobs(prefix=prefix, delimiter="/", retry=google.retry())
        for _ in listing:
            pass  # the listing knows its `prefixes`, the folders, only after all pages of objects were read
        names = [folder.removeprefix(prefix).rstrip("/") for folder in listing.prefixes]
        return sorted(
            int(name)
            for name in names
            if name.isdigit() and bucket.blob(f"{prefix}{name}/{COMMITTED}").exists(retry=google.retry())
        )


def check(place: str) -> None:
    """Raise UserError if these credentials may not write, read and delete checkpoints under gs://.

    Without this check, a missing permission to delete would first show when the run deletes an old checkpoint.
    """
    if not place.startswith("gs://"):
        return
    with _bucket(place) as (bucket, _):
        missing = sorted(
            set(PERMISSIONS) - set(bucket.test_iam_permissions(PERMISSIONS, retry=google.retry()))
        )
    if missing:
        raise UserError(
            f"checkpoint.directory = {place}: these credentials lack {', '.join(missing)}; give them {ROLES}"
        )


def checksums(place: str) -> dict[str, int]:
    """CRC-32C of each object below a gs:// prefix, by its name without the prefix. Raises UserError."""
    with _bucket(place) as (bucket, prefix):
        blobs = list(bucket.list_blobs(prefix=prefix, retry=google.retry()))
    return {b.name.removeprefix(prefix): google.crc32c(b) for b in blobs}


def claim(place: str, owner: dict[str, str]) -> None:
    """Record `owner` as the run to which the checkpoints belong.

    `owner` has an `id`, which identifies a run, and text for the user. Raises UserError if the place belongs to
    another run, or cannot be written.
    """
    check(place)
    text = json.dumps(owner)
    try:
        if place.startswith("gs://"):
            with _bucket(place) as (bucket, prefix):
                found = _create_object(bucket.blob(prefix + OWNER), text)
        else:
            found = _create_file(Path(place) / OWNER, text)
    except OSError as e:
        raise UserError(
            f"checkpoint.directory = {place} cannot be written: {e.strerror}; choose another place"
        ) from None
    try:
        if json.loads(found)["id"] == owner["id"]:
            return
    except (ValueError, TypeError, KeyError):
        pass  # not a file of ours: refuse it below, as the file of another run
    raise UserError(
        f"checkpoint.directory = {place} belongs to another run ({found.strip()[:200]}): choose another "
        f"place, or delete {place}/{OWNER} to let this run take over the checkpoints"
    )


def _create_file(path: Path, text: str) -> str:
    """Create a file, unless it exists; return its content in either case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # "x" creates or fails in one step: if two runs begin at the same time, one of them is refused.
    with contextlib.suppress(FileExistsError), path.open("x") as f:
        f.write(text)
    return path.read_text()


def _create_object(blob: Any, text: str) -> str:
    """Create an object, unless it exists; return its content in either case."""
    from google.api_core.exceptions import PreconditionFailed

    # Generation 0 means that no object exists: if two runs begin at the same time, one of them is refused.
    # https://cloud.google.com/storage/docs/request-preconditions
    with contextlib.suppress(PreconditionFailed):
        blob.upload_from_string(text, "application/json", if_generation_match=0, retry=google.retry())
    return str(blob.download_as_text(retry=google.retry()))


@contextlib.contextmanager
def _bucket(place: str) -> Iterator[tuple[Any, str]]:
    """The bucket and the prefix of a gs:// address; Google's errors become a UserError of one line."""
    where = f"checkpoint.directory = {place}"
    name, prefix = google.bucket_and_prefix(place)
    try:
        with google.explained(where, bucket=name, roles=ROLES):
            yield google.client().bucket(name), prefix
    except google.UnreachableError as e:
        raise UserError(f"{e}; try again") from None
