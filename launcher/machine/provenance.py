"""The fingerprint of this machine's code and packages: recorded in the plan, and compared with it by each worker."""

import contextlib
import hashlib
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from podlaunch import HOME, ROOMS, code

PACKAGES = ("podlaunch", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


def provenance() -> dict[str, Any]:
    """The fingerprint, with commit and dirty flag where this is a checkout."""
    changes = _git("status", "--porcelain")
    dirty = None if changes is None else bool(changes)
    return {"commit": _git("rev-parse", "HEAD"), "dirty": dirty, **fingerprint()}


def fingerprint() -> dict[str, Any]:
    """What must be the same on every host: a digest of the code, and the versions of Python and of PACKAGES."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    files = {name: file.read_bytes() for name, file in code(HOME).items()}
    return {"code": digest(files), "python": sys.version.split()[0], "packages": versions}


def differences(planned: dict[str, Any]) -> list[str]:
    """How this host's fingerprint differs from the `planned` one, a phrase for each difference."""
    actual = fingerprint()
    expected = actual | planned  # what a plan does not record, the hosts compare among themselves
    changes = []
    if expected["code"] != actual["code"]:
        changes.append(f"code {actual['code'][:12]} in {HOME}, planned {expected['code'][:12]}")
    if expected["python"] != actual["python"]:
        changes.append(f"Python {actual['python']}, planned {expected['python']}")
    for package in sorted(expected["packages"].keys() | actual["packages"].keys()):
        version = actual["packages"].get(package, "none")
        wanted = expected["packages"].get(package, "none")
        if version != wanted:
            changes.append(f"{package} {version}, planned {wanted}")
    return changes


def digest(files: Mapping[str, bytes]) -> str:
    """SHA-256 over names and contents of the code among `files`: what ends in .py in ROOMS and podlaunch/."""
    sha = hashlib.sha256()
    folders = (*ROOMS, "podlaunch")
    for name in sorted(name for name in files if name.split("/")[0] in folders and name.endswith(".py")):
        sha.update(f"{name} {len(files[name])}\n".encode() + files[name])
    return sha.hexdigest()


def _git(*arguments: str) -> str | None:
    if not (HOME / ".git").exists():  # an installed package may lie in somebody else's checkout
        return None
    with contextlib.suppress(OSError):  # there is no git on this machine
        done = subprocess.run(["git", "-C", str(HOME), *arguments], capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    return None
