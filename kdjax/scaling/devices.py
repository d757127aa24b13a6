"""Devices that are not here, as the compiler knows them."""

import contextlib
import importlib.util
import os
from typing import Any

import jax

from kdjax import chips, errors

# What libtpu otherwise asks a cloud's servers for, and the lock of a TPU.
_ALONE = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def simulated(count: int) -> list[Any]:
  """So many devices of this CPU.

  Raises:
    UserError: jax has begun with fewer.
  """
  with contextlib.suppress(RuntimeError):  # it has begun
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
  devices = jax.devices("cpu")
  if len(devices) < count:
    raise errors.UserError(
      f"this process has {len(devices)} CPU devices, needs {count}: unset "
      "XLA_FLAGS, or set JAX_NUM_CPU_DEVICES"
    )
  return devices[:count]


def described(topology: str, slices: int = 1) -> list[Any]:
  """The chips of a TPU slice, or of several, as the compiler knows them.

  Raises:
    UserError: no compiler for TPUs, or no such slice.
  """
  if not importlib.util.find_spec("libtpu"):
    raise errors.UserError(
      "libtpu, the compiler for TPUs, is not installed: pip install 'jax[tpu]',"
      " or use --devices"
    )
  from jax.experimental import topologies

  for name, value in _ALONE.items():
    os.environ.setdefault(name, value)
  several = {"num_slices": slices} if slices > 1 else {}
  try:
    found = topologies.get_topology_desc(topology, "tpu", **several)
  except Exception as error:
    told = str(error).splitlines()[0]
    raise errors.UserError(
      f"got --topology={topology}, needs CHIP:SHAPE such as v5e:4x4, v5p:4x4x4 "
      f"or v6e:16x16: {told}"
    ) from error
  devices = list(found.devices)
  chip = chips.CHIPS.get(devices[0].device_kind)
  each = len(devices) // slices
  if chip is not None and each > chip.largest:
    raise errors.UserError(
      f"--topology={topology} has {each} chips, a slice has {chip.largest} at "
      "most: take several, with --slices"
    )
  return devices
