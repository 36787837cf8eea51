"""Where a run keeps its checkpoints, a folder or a gs:// prefix: which are complete, and whose they are.

Here because launcher/ and trainer/ both ask, and the launcher without jax and Orbax.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs import google
from configs.errors import UserError

COMMITTED = "commit_success.txt"
"""What Orbax writes last into a checkpoint under gs://, where no folder can be renamed."""
OWNER = "run.json"
PERMISSIONS = (
    "storage.objects.list", "storage.objects.get", "storage.objects.create", "storage.objects.delete",
    "storage.buckets.get",  # Orbax asks for the bucket's kind as it deletes an old checkpoint
)  # fmt: skip
ROLES = "the roles Storage Object User and Storage Legacy Bucket Reader on the bucket"


def steps(place: str) -> list[int]:
    """Steps of the complete checkpoints, oldest first. Raises UserError where the place cannot be read."""
    if not place.startswith("gs://"):
        folder = Path(place)
        return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit()) if folder.is_dir() else []
    with _bucket(place) as (bucket, prefix):
        listing = bucket.list_blobs(prefix=prefix, delimiter="/", retry=google.retry())
        for _ in listing:
            pass  # objects; at the end it knows the folders, too
        names = [folder.removeprefix(prefix).rstrip("/") for folder in listing.prefixes]
        return sorted(
            int(name)
            for name in names
            if name.isdigit() and bucket.blob(f"{prefix}{name}/{COMMITTED}").exists(retry=google.retry())
        )


def check(place: str) -> None:
    """Raise UserError where checkpoints cannot be written, read and deleted: now, not at the fourth save."""
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
    """CRC of each object below a gs:// prefix."""
    with _bucket(place) as (bucket, prefix):
        blobs = list(bucket.list_blobs(prefix=prefix, retry=google.retry()))
    return {b.name.removeprefix(prefix): google.crc32c(b) for b in blobs}


def claim(place: str, owner: dict[str, str]) -> None:
    """Write down whose checkpoints these are. Raises UserError where another has, or nothing can be written.

    `owner` has `id`, which tells runs apart, and words for the user.
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
            f"checkpoint.directory = {place} cannot be written: {e.strerror}; name another place"
        ) from None
    try:
        if json.loads(found)["id"] == owner["id"]:
            return
    except (ValueError, TypeError, KeyError):
        pass
    raise UserError(
        f"checkpoint.directory = {place} belongs to another run ({found.strip()[:200]}): give this run a place "
        f"of its own, or delete {place}/{OWNER} for it to take over the checkpoints"
    )


def _create_file(path: Path, text: str) -> str:
    """Make a file, unless there is one; what it holds then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError), path.open("x") as f:
        f.write(text)
    return path.read_text()


def _create_object(blob: Any, text: str) -> str:
    """Make an object, unless there is one; what it holds then."""
    from google.api_core.exceptions import PreconditionFailed

    # 0: there is none. So of two runs that begin at the same time, one is refused.
    with contextlib.suppress(PreconditionFailed):
        blob.upload_from_string(text, "application/json", if_generation_match=0, retry=google.retry())
    return str(blob.download_as_text(retry=google.retry()))


@contextlib.contextmanager
def _bucket(place: str) -> Iterator[tuple[Any, str]]:
    """Google's bucket and the prefix of a gs:// address; errors come out as one line for the user."""
    where = f"checkpoint.directory = {place}"
    name, prefix = google.bucket_and_prefix(place)
    try:
        with google.explained(where, bucket=name, roles=ROLES):
            yield google.client().bucket(name), prefix
    except google.UnreachableError as e:
        raise UserError(f"{e}; try again") from None
