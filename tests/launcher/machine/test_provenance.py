"""The fingerprint that must be the same on all hosts, and how differences are described."""

import re
import subprocess

import pytest

from launcher.machine import provenance


def test_the_same_host_differs_in_nothing():
    assert provenance.differences(provenance.provenance()) == []


def test_digest_follows_the_code(tmp_path, monkeypatch):
    for room in provenance.ROOMS:
        (tmp_path / room).mkdir()
    (tmp_path / "launcher" / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(provenance, "HOME", tmp_path)
    planned = provenance.fingerprint()
    (tmp_path / "launcher" / "notes.txt").write_text("no code")
    assert provenance.differences(planned) == []
    (tmp_path / "launcher" / "a.py").write_text("x = 2\n")
    (difference,) = provenance.differences(planned)
    assert (
        difference
        == f"code {provenance.fingerprint()['code'][:12]} in {tmp_path}, planned {planned['code'][:12]}"
    )


def test_commit_is_ours_not_that_of_a_repository_we_are_installed_in(tmp_path, monkeypatch):
    home = tmp_path / "site-packages" / "podlaunch"
    home.mkdir(parents=True)
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "x"],
    ):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    monkeypatch.setattr(provenance, "HOME", home)
    found = provenance.provenance()
    assert (found["commit"], found["dirty"]) == (None, None)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"python": "3.9.1"}, ", planned 3.9.1"),
        ({"packages": {**provenance.fingerprint()["packages"], "jax": "0.1"}}, "jax .*, planned 0.1"),
        ({"packages": {**provenance.fingerprint()["packages"], "torch": "2"}}, "torch none, planned 2"),
    ],
)
def test_other_versions_are_named(changed, message):
    (difference,) = provenance.differences(provenance.fingerprint() | changed)
    assert re.search(message, difference)


def test_plan_of_an_earlier_podlaunch_knows_less_and_is_no_difference():
    assert provenance.differences({"commit": None}) == []
