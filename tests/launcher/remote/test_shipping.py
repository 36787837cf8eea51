"""Code for hosts without a shared disk: which files are packed, the size limit, and that only changes are sent.

Hosts receive it with bootstrap.py as they do it: its text is the argument of a Python that may be old.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from configs.errors import UserError
from launcher.host import bootstrap
from launcher.machine.provenance import digest
from launcher.remote.shipping import INTERPRETER, LOCK, SETUP, CodeArchive, pack

IDENTITY = ["-c", "user.name=a", "-c", "user.email=a@b"]


@pytest.fixture(params=["this Python", "Python 3.8"])
def host(request, tmp_path):
    """Runs a command of bootstrap.py as `ssh` would, in a home of the test's own."""
    python = sys.executable if request.param == "this Python" else python_3_8()
    if python is None:
        pytest.skip("there is no Python 3.8")
    home = tmp_path / "home"
    home.mkdir()

    def host(command, packed=b""):
        done = subprocess.run(
            [python, "-c", Path(bootstrap.__file__).read_text(), command, "podlaunch/a b"],
            input=packed,
            capture_output=True,
            cwd=home,
            check=True,
        )
        return json.loads(done.stdout)

    host.code = home / "podlaunch" / "a b" / "code"
    return host


@pytest.fixture
def checkout(tmp_path):
    """A git checkout with files of all kinds."""
    home = tmp_path / "checkout"
    for name in ("launcher/a.py", "launcher/deleted.py", "kept.log", ".gitignore", "grö ße'.txt"):
        write(home / name, name)
    (home / ".gitignore").write_text("*.log\n__pycache__/\n")
    git(home, "init", "-q")
    git(home, "add", "--all", "--force", ".")
    git(home, *IDENTITY, "commit", "-q", "-m", "all")
    (home / "launcher" / "deleted.py").unlink()
    write(home / "untracked.py", "new")
    write(home / "ignored.log", "x" * 3000)
    write(home / "launcher/__pycache__/a.pyc", "x")
    (home / "link.py").symlink_to("untracked.py")
    (home / "folder").symlink_to("launcher")
    return home


def python_3_8():
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    return next(versions.glob("3.8.*/bin/python3"), None) or shutil.which("python3.8")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def git(home, *arguments):
    subprocess.run(["git", "-C", home, *arguments], check=True, capture_output=True)


def names(packed):
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        return set(tar.getnames())


def below(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


# What is packed


def test_checkout_is_what_git_tracks_and_what_it_does_not_ignore(checkout):
    packed = pack(1, checkout)
    assert names(packed) == {".gitignore", "grö ße'.txt", "kept.log", "launcher/a.py", "untracked.py"}


def test_file_name_that_is_not_utf8_is_packed_too(checkout):
    Path(os.fsdecode(bytes(checkout / "caf") + b"\xe9.py")).write_text("x")
    assert os.fsdecode(b"caf\xe9.py") in CodeArchive(pack(1, checkout)).digests


def test_folder_that_is_no_checkout_is_the_code_of_the_package(tmp_path):
    for name in ("launcher/a.py", "trainer/data/b.py", "configs/quickstart.yaml", "data/images.bin"):
        write(tmp_path / name, "x")
    assert names(pack(1, tmp_path)) == {"launcher/a.py", "trainer/data/b.py"}


def test_installed_package_is_packed_as_a_checkout_lies(tmp_path):
    """The rooms are inside the package there, here in an environment within a git repository that tracks it."""
    home = tmp_path / "site-packages" / "podlaunch"
    for name in ("__init__.py", "host.py", "launcher/a.py", "configs/quickstart.yaml"):
        write(home / name, "x")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "--all", ".")
    assert names(pack(1, home)) == {"podlaunch/__init__.py", "podlaunch/host.py", "launcher/a.py"}


def test_two_links_to_one_file_are_two_files(tmp_path, host):
    write(tmp_path / "launcher/a.py", "x")
    (tmp_path / "launcher/b.py").hardlink_to(tmp_path / "launcher/a.py")
    code = CodeArchive(pack(1, tmp_path))
    host("receive", code.delta({}))
    (host.code / "launcher/a.py").unlink()
    host("receive", code.delta(host("probe")["files"]))
    assert (host.code / "launcher/a.py").read_text() == "x"


def test_code_above_the_limit_is_refused_with_its_largest_files(checkout):
    write(checkout / "big.bin", "x" * 2**20)
    write(checkout / "bigger.bin", "x" * 2**21)
    refusal = (
        r"has 3 MiB, above max_code_mib = 2\.5; the largest files are bigger\.bin, big\.bin, .*\.gitignore"
    )
    with pytest.raises(UserError, match=refusal) as refused:
        pack(2.5, checkout)
    assert "\n" not in str(refused.value)
    pack(3.5, checkout)


def test_environment_can_be_made_of_code_that_has_the_lock_file_and_the_script(tmp_path, checkout):
    assert not CodeArchive(pack(1, checkout)).has_environment
    write(checkout / LOCK, "jax==1")
    assert not CodeArchive(pack(1, checkout)).has_environment
    write(checkout / SETUP, "#!/bin/sh")
    assert not CodeArchive(pack(1, checkout)).has_environment
    for name in INTERPRETER:
        write(checkout / name, "{}")
    assert CodeArchive(pack(1, checkout)).has_environment


# What a host gets


def test_host_gets_all_once_and_then_what_changed(checkout, host):
    first = CodeArchive(pack(1, checkout))
    probe = host("probe")
    assert probe["files"] == {}
    assert probe["folder"] == str(host.code.parent)
    assert probe["disk_bytes"] > 0
    host("receive", first.delta(probe["files"]))
    assert below(host.code) == {*first.digests, bootstrap.MANIFEST}
    assert (host.code / "grö ße'.txt").read_text() == "grö ße'.txt"
    assert first.delta(host("probe")["files"]) is None
    write(checkout / "launcher/a.py", "changed")
    second = CodeArchive(pack(1, checkout)).delta(host("probe")["files"])
    assert names(second) == {bootstrap.MANIFEST, "launcher/a.py"}
    host("receive", second)
    assert (host.code / "launcher/a.py").read_text() == "changed"
    assert CodeArchive(pack(1, checkout)).delta(host("probe")["files"]) is None


def test_deleted_files_are_removed_from_the_host_and_bytecode_is_ignored(checkout, host):
    host("receive", CodeArchive(pack(1, checkout)).delta({}))
    write(host.code / "launcher/__pycache__/a.cpython-312.pyc", "x")
    code = CodeArchive(pack(1, checkout))
    assert code.delta(host("probe")["files"]) is None
    (checkout / "untracked.py").unlink()
    write(host.code / "stray.py", "x")
    code = CodeArchive(pack(1, checkout))
    missing = code.delta(host("probe")["files"])
    assert names(missing) == {bootstrap.MANIFEST}
    host("receive", missing)
    assert below(host.code) == {
        *code.digests, bootstrap.MANIFEST, "launcher/__pycache__/a.cpython-312.pyc"
    }  # fmt: skip


def test_file_may_become_a_folder(checkout, host):
    host("receive", CodeArchive(pack(1, checkout)).delta({}))
    (checkout / "untracked.py").unlink()
    write(checkout / "untracked.py/inner.py", "x")
    host("receive", CodeArchive(pack(1, checkout)).delta(host("probe")["files"]))
    assert (host.code / "untracked.py/inner.py").read_text() == "x"


def test_folder_may_become_a_file(checkout, host):
    write(checkout / "x/inner.py", "x")
    host("receive", CodeArchive(pack(1, checkout)).delta({}))
    shutil.rmtree(checkout / "x")
    write(checkout / "x", "a file")
    host("receive", CodeArchive(pack(1, checkout)).delta(host("probe")["files"]))
    assert (host.code / "x").read_text() == "a file"


def test_host_computes_the_same_digest_as_the_launcher(checkout, host):
    """Files in the checkout that git ignores do not change it."""
    (checkout / ".gitignore").write_text("*.log\nlocal.py\n")
    write(checkout / "launcher/local.py", "mine")
    code = CodeArchive(pack(1, checkout))
    host("receive", code.delta({}))
    there = {str(f.relative_to(host.code)): f.read_bytes() for f in host.code.rglob("*") if f.is_file()}
    assert code.provenance == digest(there)


def test_file_that_was_cut_in_transit_is_sent_again(checkout, host):
    code = CodeArchive(pack(1, checkout))
    host("receive", code.delta({}))
    (host.code / "launcher/a.py").write_text("launch")
    assert names(code.delta(host("probe")["files"])) == {bootstrap.MANIFEST, "launcher/a.py"}
