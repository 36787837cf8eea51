"""What the kernel says of memory that ran out on this machine."""

from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")


def num_oom_kills(group: Path = Path("/proc/self/cgroup")) -> int:
    """How many processes of this process's control group were ended since memory ran out; 0 where nobody counts."""
    return max((_count(file) for file in _files(group)), default=0)


def _files(group: Path) -> list[Path]:
    """The files with the count: the first is of version 1 of control groups, the other of version 2."""
    try:
        lines = [line.split(":", 2) for line in group.read_text().splitlines()]
    except OSError:  # not on Linux
        return []
    found = []
    for _, controllers, path in lines:
        if controllers == "memory":
            found.append(GROUPS / "memory" / path[1:] / "memory.oom_control")
        elif not controllers:
            found.append(GROUPS / path[1:] / "memory.events")
    return found


def _count(file: Path) -> int:
    try:
        fields = dict(line.split() for line in file.read_text().splitlines())
    except OSError:  # in a container, which has its own view of the groups
        return 0
    return int(fields.get("oom_kill", 0))
