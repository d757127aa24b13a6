"""Eight CPU devices; each program is compiled once for the whole run."""

import os
import tempfile

# Tests compile much and compute little: LLVM's optimiser would take most of the
# time. What ships is compiled with it; `.ci/run` runs the main job so.
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
  ]
)
os.environ["JAX_PLATFORMS"] = "cpu"
# The workers of one run share what they compile; the next run starts afresh.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="kdjax-test-")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
