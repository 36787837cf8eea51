"""Memory that ran out, as the kernel counts it: in a control group of the test's own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.machine import memory
from launcher.machine.memory import num_oom_kills

pytestmark = pytest.mark.linux

LIMIT_BYTES = 64 * 2**20
# Joins the group; then a child of it needs more than the group may have, and is the one that the kernel ends.
HOST = """
import subprocess, sys
from pathlib import Path
from launcher.machine.memory import num_oom_kills
Path(sys.argv[1], "cgroup.procs").write_text("0")
before = num_oom_kills()
greedy = "open('/proc/self/oom_score_adj', 'w').write('1000'); bytearray(2**29)"
code = subprocess.run([sys.executable, "-c", greedy]).returncode
print(code, num_oom_kills() - before)
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group that may use little memory."""
    root, limit = memory.GROUPS / "memory", "memory.limit_in_bytes"
    if not root.is_dir():
        root, limit = memory.GROUPS, "memory.max"
    group = root / f"podlaunch-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(LIMIT_BYTES))
    except OSError as e:
        pytest.skip(f"no control group can be made here: {e.strerror}")
    yield group
    group.rmdir()


def test_process_that_the_kernel_ended_for_memory_is_counted(group):
    done = subprocess.run(
        [sys.executable, "-c", HOST, str(group)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["-9", "1"]


def test_group_that_nobody_counts_in_has_no_kills(tmp_path):
    assert num_oom_kills(tmp_path / "absent") == 0
    unknown = tmp_path / "cgroup"
    unknown.write_text("4:memory:/not/here\n0::/nor/here\n")
    assert num_oom_kills(unknown) == 0
