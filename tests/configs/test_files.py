"""Files are replaced atomically, and the cache folder follows XDG_CACHE_HOME."""

import pytest

from configs.files import cache_folder, write_atomically


def test_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "podlaunch"


@pytest.mark.parametrize("empty", [False, True])
def test_cache_is_in_the_home_without_xdg(monkeypatch, tmp_path, empty):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if empty:
        monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == tmp_path / ".cache" / "podlaunch"


def test_write_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "result.json"
    for text in ("first, and longer", "zweiter ✓"):
        write_atomically(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]
