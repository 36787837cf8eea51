"""The cheap ones of these tests, with a CPU in the GPU's place: so they work on the day when there is a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster


def test_the_tests_of_a_gpu_pass_on_a_cpu():
    numbers = Path(__file__).with_name("test_numbers.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", str(numbers), "-k", "not gradients"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, env=environment | {"TEST_GPU_ON": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout
