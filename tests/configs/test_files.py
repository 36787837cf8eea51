"""Files are replaced atomically, the cache follows XDG_CACHE_HOME, and temporary folders end with their process."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.files import cache_folder, temporary_folder, write_atomically


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


HOLD = """
import sys
from pathlib import Path
from configs.files import temporary_folder
with temporary_folder("test", Path(sys.argv[1])) as folder:
    (folder / "file").touch()
    print(folder, flush=True)
    sys.stdin.read()
"""


def holding(place: Path) -> tuple["subprocess.Popen[str]", Path]:
    """A process that has a temporary folder, and the folder."""
    command = [sys.executable, "-c", HOLD, str(place)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    return holder, Path(holder.stdout.readline().strip())


def test_temporary_folder_ends_with_its_process_even_if_that_is_killed(tmp_path):
    killed, left = holding(tmp_path)
    living, kept = holding(tmp_path)
    with killed, living:
        killed.kill()
        killed.wait()
        assert left.is_dir()
        ended = []
        with temporary_folder("another", tmp_path, ended.append):
            assert left.is_dir()  # what ends its folders knows nothing of this kind
        with temporary_folder("test", tmp_path, ended.append) as folder:
            assert not left.exists()
            assert (kept / "file").exists()
            assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
        assert ended[-2:] == [left, folder]
        living.communicate("")
    (place,) = tmp_path.iterdir()
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    "make", [lambda p: p.mkdir(mode=0o755), lambda p: p.symlink_to("/"), lambda p: p.touch()]
)
def test_temporary_folder_is_not_made_where_others_may_write(tmp_path, make):
    with temporary_folder("test", tmp_path) as folder:
        place = folder.parent
    place.rmdir()
    make(place)
    with pytest.raises(UserError, match="is not a folder of yours alone"), temporary_folder("test", tmp_path):
        pass
