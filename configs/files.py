"""Where files go, and files that another process reads. Here because both launcher/ and trainer/ may import this room."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """What can be made again: $XDG_CACHE_HOME/podlaunch, by default ~/.cache/podlaunch."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "podlaunch"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`; a reader, or a crash, sees the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)
