"""The entry point of the programs that the launcher starts on hosts: `python -P -m podlaunch.host PROGRAM ARGUMENTS`.

-P keeps the current folder off the module path. `enter_home` puts our rooms before any folder in PYTHONPATH.
"""

import importlib
import sys

from podlaunch import enter_home

PROGRAMS = ("agent", "preflight", "task", "worker")


def main() -> None:
    program = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if program not in PROGRAMS:
        sys.exit(f"podlaunch.host: unknown program {program!r}; allowed: {', '.join(PROGRAMS)}")
    enter_home()
    importlib.import_module(f"launcher.host.{program}").main()


if __name__ == "__main__":
    main()
