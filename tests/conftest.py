"""Four CPU devices in every test process, and cache folders of the session's own."""

import os
import tempfile

# Read by jax when a test module first imports it, so set before any is collected. What two tests compile is
# compiled once; nothing of the user's own cache is read or written.
_CACHE = tempfile.TemporaryDirectory(prefix="podlaunch-tests-")
os.environ |= {
    # The tests compile much and compute little: without LLVM's optimisations they take a third of the time.
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "4",
    "JAX_COMPILATION_CACHE_DIR": f"{_CACHE.name}/compiled",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "XDG_CACHE_HOME": _CACHE.name,
}
