"""Where podlaunch is installed, and how its own processes find its rooms.

The rooms are the packages configs, launcher, models and trainer. A user's repository may use the same plain names,
so an installed podlaunch keeps its rooms inside this package, where other imports do not find them, and its own
processes put that folder first on their module path. In a checkout the rooms are next to this package.
"""

import sys
from pathlib import Path

ROOMS = ("configs", "launcher", "models", "trainer")
PACKAGE = Path(__file__).absolute().parent
HOME = PACKAGE if (PACKAGE / "launcher").is_dir() else PACKAGE.parent
"""The folder that holds the rooms."""


def code(home: Path = HOME) -> dict[str, Path]:
    """The Python files of the podlaunch whose rooms are in `home`, keyed by their paths in a checkout."""
    package = home / "podlaunch" if (home / "podlaunch").is_dir() else home
    files = {f"podlaunch/{file.name}": file for file in package.glob("*.py")}
    for room in ROOMS:
        files |= {str(file.relative_to(home)): file for file in (home / room).rglob("*.py")}
    return dict(sorted(files.items()))


def enter_home() -> None:
    """Put HOME first on this process's module path. Only entry points call this; imports have no such effect."""
    home = str(HOME)
    sys.path[:] = [home, *(folder for folder in sys.path if folder != home)]
