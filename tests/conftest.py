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

import jax

jax.config.update("jax_numpy_rank_promotion", "allow")

# The workers of one run share what they compile; the next run starts afresh.
_cache = os.environ.setdefault(
  "KDJAX_TEST_COMPILATION_CACHE", tempfile.mkdtemp(prefix="kdjax-test-")
)
jax.config.update("jax_compilation_cache_dir", _cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
