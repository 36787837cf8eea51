"""Where podlaunch is, and how its own processes find its rooms.

The rooms (configs, launcher, models, trainer) have plain names, which a user's repository may have as well. So an
installed podlaunch keeps the rooms inside this package, where no other import finds them, and podlaunch's own
processes put that folder first on the module path. In a checkout the rooms lie beside this package.
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
    """Have this process find our rooms before any others. Only entry points call this: an import changes nothing."""
    home = str(HOME)
    sys.path[:] = [home, *(folder for folder in sys.path if folder != home)]
