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
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        **fingerprint(),
    }


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
    mine = fingerprint()
    found = []
    if planned.get("code", mine["code"]) != mine["code"]:
        found.append(f"code {mine['code'][:12]} in {HOME}, planned {planned['code'][:12]}")
    if planned.get("python", mine["python"]) != mine["python"]:
        found.append(f"Python {mine['python']}, planned {planned['python']}")
    packages, versions = planned.get("packages", mine["packages"]), mine["packages"]
    for package in sorted(packages.keys() | versions.keys()):
        there, now = packages.get(package, "none"), versions.get(package, "none")
        if there != now:
            found.append(f"{package} {now}, planned {there}")
    return found


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
    with contextlib.suppress(OSError):
        done = subprocess.run(["git", "-C", str(HOME), *arguments], capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
    return None
