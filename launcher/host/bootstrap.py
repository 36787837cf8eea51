"""What runs on a TPU VM before our code is there: `python3 -c THIS COMMAND FOLDER`, on any Python from 3.8 on.

probe     prints host, disk, clock and the digests of the code that the VM has, as a line of JSON
receive   unpacks the tar on standard input, and removes files that its manifest does not list
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import time

MANIFEST = ".manifest.json"
ALIVE = "/run/podlaunch/alive"


def show_life():  # type: ignore[no-untyped-def]
    """Tell this VM that it is in use: otherwise deploy/tpu/startup.sh deletes it."""
    with contextlib.suppress(OSError):  # podlaunch did not create this VM
        os.utime(ALIVE)


def files_below(code):  # type: ignore[no-untyped-def]
    for parent, folders, names in os.walk(code):
        folders[:] = [folder for folder in folders if folder != "__pycache__"]
        for name in names:
            path = os.path.join(parent, name)
            yield path, os.path.relpath(path, code)


def probe(folder):  # type: ignore[no-untyped-def]
    show_life()
    os.makedirs(folder, exist_ok=True)
    code, files = os.path.join(folder, "code"), {}
    for path, name in files_below(code):
        with open(path, "rb") as f:
            files[name] = hashlib.sha256(f.read()).hexdigest()
    return {
        "host": os.uname().nodename,
        "home": os.path.expanduser("~"),
        "folder": os.path.abspath(folder),
        "time": time.time(),
        "disk_bytes": shutil.disk_usage(folder).free,
        "files": files,
    }


def receive(folder):  # type: ignore[no-untyped-def]
    code = os.path.join(folder, "code")
    with tarfile.open(fileobj=io.BytesIO(sys.stdin.buffer.read())) as archive:
        wanted = set(json.load(archive.extractfile(MANIFEST)))  # type: ignore[arg-type]
        changed = set(archive.getnames())
        for path, name in list(files_below(code)):
            if name not in wanted or name in changed:  # a changed file may be read-only
                os.remove(path)
        for parent, _, _ in os.walk(code, topdown=False):
            # An empty folder goes, since a file of the tar may have its name.
            if parent != code and set(os.listdir(parent)) <= {"__pycache__"}:
                shutil.rmtree(parent)
        archive.extractall(code)  # noqa: S202 (the launcher made the tar, and ssh brought it)
    return {}


if __name__ == "__main__":
    print(json.dumps({"probe": probe, "receive": receive}[sys.argv[1]](sys.argv[2])))
