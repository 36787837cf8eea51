"""Find the file of a recipe that is given by name or by path: `launch r50`, `launch configs/mine.yaml`."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from configs.errors import UserError
from configs.load import nearest

OURS = Path(__file__).parent
"""The folder of the recipes that come with podlaunch."""
SUFFIXES = (".yaml", ".yml")
NO_RECIPES = ("clusters", "prices")
NAMES_SHOWN = 12


def find(word: str, commands: Sequence[str] = ()) -> Path:
    """The path `word` if that is a file; otherwise `word`.yaml in this folder, in configs/, or among ours.

    Raises UserError if there is no such recipe; the message suggests a recipe or one of `commands`. If `word` ends
    in .yaml and does not exist, it is returned unchanged and `load` reports it, unless one of ours has its name.
    """
    if _is_file(word):
        return Path(word)
    stem, suffix = os.path.splitext(os.path.basename(word))
    if suffix in SUFFIXES:
        if stem in _names(OURS):
            raise UserError(f"{word}: no such file; for the recipe that comes with podlaunch, write {stem}")
        return Path(word)
    for folder in (Path(), Path("configs"), OURS):
        for file in (folder / f"{word}{suffix}" for suffix in SUFFIXES):
            if file.stem not in NO_RECIPES and _is_file(file):
                return file
    raise UserError(_unknown(word, commands))


def _unknown(word: str, commands: Sequence[str]) -> str:
    ours = _names(OURS)
    here = [name for name in _names(Path(), Path("configs")) if name not in ours]
    hint = nearest(word, [*commands, *here, *ours])
    known = (
        f"your recipes: {_some(here)}; built-in recipes: {_some(ours)}" if here else f"recipes: {_some(ours)}"
    )
    if commands:
        return f"{word}: neither a command nor a recipe{hint} ({known}; see `launch --help`)"
    return f"{word}: no such recipe{hint} ({known})"


def _names(*folders: Path) -> list[str]:
    files = (file for folder in folders for suffix in SUFFIXES for file in folder.glob(f"[!.]*{suffix}"))
    return sorted({file.stem for file in files} - set(NO_RECIPES), key=_by_number)


def _by_number(name: str) -> list[tuple[int, str]]:
    """A sort key that compares numbers by value: r18 comes before r101."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join([*names[:NAMES_SHOWN], *([f"{more} more"] if more > 0 else [])])


def _is_file(path: str | Path) -> bool:
    """Whether `path` is a file or a pipe, such as that of `<(…)`. A folder or an invalid path is neither."""
    return os.path.exists(path) and not os.path.isdir(path)
