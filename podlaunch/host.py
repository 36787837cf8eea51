"""What the launcher starts, here or on another host: `python -P -m podlaunch.host PROGRAM ARGUMENTS`.

-P keeps the current folder off the path; a PYTHONPATH that names a user's rooms is beaten by putting ours first.
"""

import importlib
import sys

from podlaunch import enter_home

PROGRAMS = {
    "task": "launcher.host",
    "worker": "launcher.worker",
    "agent": "launcher.agent",
    "preflight": "launcher.preflight",
}


def main() -> None:
    program = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if program not in PROGRAMS:
        sys.exit(f"podlaunch.host {program}: allowed: {', '.join(PROGRAMS)}")
    enter_home()
    importlib.import_module(PROGRAMS[program]).main()


if __name__ == "__main__":
    main()
