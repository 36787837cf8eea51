"""Four CPU devices in every test process, separate cache folders for the session, and a fake Cloud Storage.

With TEST_GPU_ON=gpu, as `make test-gpu` has it, the first GPU and one CPU device; with TEST_GPU_ON=cpu, which rehearses
tests/gpu, one CPU device alone.
"""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator

import pytest

from tests import gcs as gcs_server

# Read by jax when a test module first imports it, so set before any is collected. What two tests compile is
# compiled once; nothing of the user's own cache is read or written. Workers of xdist inherit all this, so they
# share the cache of the process that starts them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="podlaunch-tests-")
    os.environ |= {
        # The tests compile much and compute little: without LLVM's optimisations they take a third of the time.
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_COMPILATION_CACHE_DIR": f"{_CACHE.name}/compiled",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "XDG_CACHE_HOME": _CACHE.name,
        "XDG_STATE_HOME": _CACHE.name,
    }
    if (_ON := os.environ.get("TEST_GPU_ON")) == "gpu":
        os.environ |= {
            "XLA_FLAGS": "",  # the one above would slow the GPU's kernels as well
            "JAX_PLATFORMS": "cuda,cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
            # The tests start workers, which need memory of the same GPU.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
    elif _ON:
        os.environ |= {"JAX_NUM_CPU_DEVICES": "1", "CUDA_VISIBLE_DEVICES": ""}

# A background job of a script ignores SIGINT, and what it starts would, too. Handled, it is no less ignored here,
# but not by the commands that tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Write the seconds of each test where .ci/run wants them."""
    place = os.environ.get("TEST_SECONDS")
    if place and "PYTEST_XDIST_WORKER" not in os.environ:
        reports = [r for some in terminalreporter.stats.values() for r in some if hasattr(r, "duration")]
        with open(place, "a") as f:
            f.writelines(f"{report.duration:.3f} {report.nodeid}\n" for report in reports)


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[gcs_server.Server]:
    """A fake Cloud Storage for this test; Google's client, gcsfs and TensorStore use it, here and in child processes."""
    server = gcs_server.Server()
    for name, value in gcs_server.environment(server.address).items():
        monkeypatch.setenv(name, value)
    yield server
    server.close()
    if "gcsfs" in sys.modules:  # its listings would outlive the server
        for filesystem in sys.modules["gcsfs"].GCSFileSystem._cache.values():
            filesystem.invalidate_cache()
