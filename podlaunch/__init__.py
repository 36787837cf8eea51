"""Where podlaunch is, and how its own processes find its rooms.

The rooms (configs, launcher, models, trainer) have plain names, which a user's repository may have as well. So an
installed podlaunch keeps them inside this package, where nobody's imports look, and its own processes put that
place first. In a checkout they lie beside this package.
"""

import sys
from pathlib import Path

ROOMS = ("configs", "launcher", "models", "trainer")
PACKAGE = Path(__file__).absolute().parent
HOME = PACKAGE if (PACKAGE / "launcher").is_dir() else PACKAGE.parent
"""The folder that holds the rooms."""


def code(home: Path = HOME) -> dict[str, Path]:
    """All Python files of the podlaunch whose rooms are in `home`, by their names in a checkout."""
    package = home / "podlaunch" if (home / "podlaunch").is_dir() else home
    files = {f"podlaunch/{file.name}": file for file in package.glob("*.py")}
    for room in ROOMS:
        files |= {str(file.relative_to(home)): file for file in (home / room).rglob("*.py")}
    return dict(sorted(files.items()))


def enter_home() -> None:
    """Have this process find our rooms before any others. For entry points: importing podlaunch changes nothing."""
    home = str(HOME)
    sys.path[:] = [home, *(place for place in sys.path if place != home)]
