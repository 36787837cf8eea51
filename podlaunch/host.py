"""The programs that the launcher starts, here or on another host: `python -P -m podlaunch.host PROGRAM ARGUMENTS`.

-P keeps the current folder off the module path, and our rooms come before those that PYTHONPATH may name.
"""

import importlib
import sys

from podlaunch import enter_home

PROGRAMS = ("agent", "preflight", "task", "worker")


def main() -> None:
    program = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if program not in PROGRAMS:
        sys.exit(f"podlaunch.host {program}: allowed: {', '.join(PROGRAMS)}")
    enter_home()
    importlib.import_module(f"launcher.host.{program}").main()


if __name__ == "__main__":
    main()
