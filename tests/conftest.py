"""Eight CPU devices; each program is compiled once for the whole run."""

import gc
import importlib.metadata
import os
import tempfile

# Tests compile much and compute little: LLVM's optimiser would take most of the
# time, and so does the newer emitter. What ships is compiled with both;
# `.ci/run` runs the main job so. The caller's flags win: the last one counts.
os.environ["XLA_FLAGS"] = " ".join(
  [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    # Later versions know no older emitter, and end at an unknown flag.
    "--xla_cpu_use_fusion_emitters=false"
    if importlib.metadata.version("jaxlib").startswith("0.10.")
    else "",
    os.environ.get("XLA_FLAGS", ""),
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
import pytest

# Traces are many small objects: to look for cycles among all of them again and
# again, as Python does after 700 new ones, takes a quarter of a trace's time.
gc.set_threshold(50_000, 10, 10)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def _forget():
  """A worker would hold every program that it ever ran: 4 GB at the end."""
  yield
  jax.clear_caches()


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
  """A run of test_loop that nothing stops, and its folder: change neither."""
  import test_loop

  folder = tmp_path_factory.mktemp("whole")
  return test_loop.run(test_loop.batches(), folder=folder), folder


@pytest.fixture(scope="module")
def each_network_once():
  """A module's experiments share what is traced of their networks."""
  from kdjax import config

  whole, made = config.model, {}

  def model(network, *sizes):
    key = network.to_json(), sizes
    if key not in made:
      made[key] = whole(network, *sizes)
    return made[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(config, "model", model)
    yield
