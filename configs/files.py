"""The cache folder, and atomic writes of files that other processes read.

In configs/ because launcher/ and trainer/ both need it and may not import each other.
"""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Folder for files that podlaunch can create again: $XDG_CACHE_HOME/podlaunch, by default ~/.cache/podlaunch."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "podlaunch"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the file at `path` by `content`. A reader sees the old file or the new one, never a part, even after
    this process is killed. Raises OSError.
    """
    # In the same folder, because a rename is atomic only within a file system.
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)
